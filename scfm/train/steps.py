"""Where the batches of a run come from: each is a function of the seed and its number, so a run resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset

from scfm import objectives
from scfm.data import CellBatch, TokenBudgetSampler
from scfm.encoding.hashing import mix
from scfm.errors import EmptyCellError

StepBatch = tuple[CellBatch, objectives.Targets]


class Source(Protocol):
    """Endless epochs of batches, positioned by the number of batches since the first one."""

    def seek(self, step: int) -> None:
        """Go to the batch that comes `step` batches after the first one, over all epochs."""
        ...

    def __iter__(self) -> Iterator[CellBatch]:
        """Yield the remaining batches of the epoch, then move on to the next epoch."""
        ...


@dataclass
class Steps(IterableDataset[StepBatch]):
    """Corrupted batches of the steps `start` to `stop` of a run, for one process.

    A step has `n_lanes` batches over all processes, one of each lane. The masks of a batch depend on the seed, the step and
    the lane, so that it does not matter which process a lane belongs to.

    Attributes
    ----------
    sources
        The batches of each lane of this process.
    lanes
        Their numbers.
    objective
        Makes inputs and targets of a batch.
    """

    sources: Sequence[Source]
    lanes: Sequence[int]
    objective: objectives.Objective
    seed: int
    stop: int
    n_lanes: int = 1
    start: int = 0

    def __iter__(self) -> Iterator[StepBatch]:
        batches = [_endless(source, self.start) for source in self.sources]
        for step in range(self.start, self.stop):
            for lane, of_lane in zip(self.lanes, batches):
                generator = torch.Generator().manual_seed(step_seed(self.seed, step * self.n_lanes + lane))
                yield self.objective.corrupt(next(of_lane), generator)

    def __len__(self) -> int:
        # The complete run, wherever it starts: Lightning counts a resumed run on from the batches done before.
        return self.stop * len(self.lanes)


def _endless(source: Source, step: int) -> Iterator[CellBatch]:
    source.seek(step)
    while True:
        is_empty = True
        for cells in source:
            is_empty = False
            yield cells
        if is_empty:
            raise EmptyCellError("There is no cell to train on: none expresses a gene of the vocabulary.")


class MemorySource:
    """Endless epochs over encoded cells in memory, batch by batch."""

    def __init__(self, cells: CellBatch, sampler: TokenBudgetSampler) -> None:
        self.cells, self.sampler = cells, sampler

    def seek(self, step: int) -> None:
        self.sampler.seek(step)

    def __iter__(self) -> Iterator[CellBatch]:
        for rows in self.sampler:
            yield self.cells.select(rows)


def step_seed(seed: int, number: int) -> int:
    """One seed of 63 bits for each (seed, number), by the finalizer of SplitMix64."""
    state = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 - 0x9E3779B97F4A7C15) & (2**64 - 1)
    return int(mix(np.array([state], dtype=np.uint64))[0]) >> 1
