import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from scfm.data import TokenBudgetSampler

LENGTHS = np.random.default_rng(0).integers(1, 300, 1000)


@given(
    lengths=st.lists(st.integers(0, 50), max_size=80),
    max_tokens=st.integers(1, 200),
    max_cells=st.one_of(st.none(), st.integers(1, 9)),
    world_size=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_every_cell_once_within_the_budget(lengths, max_tokens, max_cells, world_size, shuffle):
    settings = {"max_tokens": max_tokens, "max_cells": max_cells, "shuffle": shuffle, "world_size": world_size}
    ranks = [TokenBudgetSampler(lengths, rank=rank, **settings) for rank in range(world_size)]
    parts = [list(sampler) for sampler in ranks]
    assert len({len(part) for part in parts}) == 1
    # Batches dealt out rank by rank; a last round may repeat the first batches, and nothing else.
    dealt = [batch for round_ in zip(*parts) for batch in round_]
    cells = [cell for batch in dealt for cell in batch.tolist()]
    assert set(cells) == set(range(len(lengths)))
    firsts = list({id(batch): batch for batch in dealt}.values())
    assert all(sum(lengths[cell] for cell in batch) <= max_tokens or len(batch) == 1 for batch in firsts)
    assert all(len(batch) <= (max_cells or len(lengths)) for batch in firsts)
    keys = [tuple(batch.tolist()) for batch in dealt]
    assert len(keys) - len(set(keys)) < world_size
    assert sum(map(len, set(keys))) == len(lengths)


def test_epochs_are_shuffled_anew_and_repeat_by_seed():
    def order(seed, epoch):
        sampler = TokenBudgetSampler(LENGTHS, max_tokens=2000, seed=seed)
        return [np.concatenate(list(sampler)).tolist() for _ in range(epoch + 1)][epoch]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_batches_hold_cells_of_like_length():
    shuffled = TokenBudgetSampler(LENGTHS, max_tokens=2000)
    spread = np.mean([np.ptp(LENGTHS[batch]) for batch in shuffled])
    in_order = np.mean(
        [np.ptp(LENGTHS[batch]) for batch in TokenBudgetSampler(LENGTHS, max_tokens=2000, shuffle=False)]
    )
    assert spread < in_order / 5


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_position_is_a_number_of_batches_over_all_epochs(world_size):
    def sampler():
        return TokenBudgetSampler(LENGTHS, max_tokens=3000, seed=4, rank=world_size - 1, world_size=world_size)

    whole = sampler()
    expected = [*whole, *whole, *whole]
    for step in (0, 7, len(expected) // 2, len(expected) - 1):
        resumed = sampler()
        resumed.seek(step)
        seen: list = []
        while len(seen) < len(expected) - step:
            seen += resumed
        assert all(np.array_equal(one, other) for one, other in zip(seen, expected[step:], strict=True)), step


def test_no_cells_are_no_batches_wherever_it_stands():
    sampler = TokenBudgetSampler([], max_tokens=10)
    sampler.seek(5)
    assert list(sampler) == []


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_tokens": 9, "max_cells": 0}, {"max_tokens": 9, "rank": 1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        TokenBudgetSampler(LENGTHS, **wrong)
