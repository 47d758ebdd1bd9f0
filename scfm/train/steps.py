"""Where the batches of a run come from: each is a function of the seed and its number, so a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset

from scfm import objectives
from scfm.data import CellBatch, TokenBudgetSampler
from scfm.train.stream import CellStream

StepBatch = tuple[CellBatch, objectives.Targets]


@dataclass
class Steps(IterableDataset[StepBatch]):
    """Corrupted batches `start` to `stop` of a run.

    Attributes
    ----------
    source
        Encoded cells with a sampler of rows, or a stream from files; one of a rank.
    objective
        Makes inputs and targets of a batch; its masks depend on the seed, the number of the batch and the rank alone.
    """

    source: MemorySource | CellStream
    objective: objectives.Objective
    seed: int
    stop: int
    start: int = 0
    rank: int = 0

    def __iter__(self) -> Iterator[StepBatch]:
        self.source.seek(self.start)
        number = self.start
        while number < self.stop:
            for cells in self.source:
                generator = torch.Generator().manual_seed(step_seed(self.seed, number, self.rank))
                yield self.objective.corrupt(cells, generator)
                number += 1
                if number == self.stop:
                    return

    def __len__(self) -> int:
        # The whole run, wherever it starts: Lightning counts a resumed run on from the batches done before.
        return self.stop


class MemorySource:
    """Endless epochs over encoded cells in memory, batch by batch."""

    def __init__(self, cells: CellBatch, sampler: TokenBudgetSampler) -> None:
        self.cells, self.sampler = cells, sampler

    def seek(self, step: int) -> None:
        """Go to the batch that comes `step` batches after the first one, over all epochs."""
        self.sampler.seek(step)

    def __iter__(self) -> Iterator[CellBatch]:
        for rows in self.sampler:
            yield self.cells.select(rows)


def step_seed(seed: int, number: int, rank: int = 0) -> int:
    """One seed for each (seed, batch, rank), spread over 63 bits by splitmix64's finaliser."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + rank * 0x8CB92BA72F3D8DD7) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
