"""Which process of a run this is."""

from __future__ import annotations

from scfm.data.ranks import torchrun_rank
from scfm.train.config import FitConfig


def rank_and_world_size(config: FitConfig) -> tuple[int, int]:
    """Rank and number of processes, from torchrun's environment; without torchrun, one process.

    Raises
    ------
    ValueError
        If several devices are asked for outside torchrun, which could not be told their parts of the data.
    """
    rank, world_size = torchrun_rank()
    if world_size > 1:
        return rank, world_size
    if config.devices not in (1, "1") or config.n_nodes > 1:
        raise ValueError(
            f"`devices` is {config.devices!r} and `n_nodes` {config.n_nodes}; start several processes with torchrun: "
            "`torchrun --nproc-per-node N $(which scfm) pretrain ... --devices N`."
        )
    return 0, 1
