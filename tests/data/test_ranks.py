"""Shares of ranks cover everything once, and are as even as they can be."""

import pytest

from scfm.data.ranks import gather, range_of_rank, torchrun_rank


@pytest.mark.parametrize("n_items", [0, 1, 7, 64, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_cover_everything_once_and_evenly(n_items, world_size):
    shares = [range_of_rank(n_items, rank, world_size) for rank in range(world_size)]
    assert [item for share in shares for item in share] == list(range(n_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_rank() == (0, 1)
    assert gather("mine") == ["mine"]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert torchrun_rank() == (2, 5)
