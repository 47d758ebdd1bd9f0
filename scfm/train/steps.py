"""The batches of a run; each depends only on the seed and its number, so a run can be resumed at any step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
N_AHEAD = 2  # batches that wait for a GPU


class Source(Protocol):
    """A source of batches over any number of epochs, which can continue at any batch."""

    def seek(self, step: int) -> None:
        """Continue with batch `step`, counted from 0 over all epochs."""
        ...

    def __iter__(self) -> Iterator[CellBatch]:
        """Yield the remaining batches of the epoch, then move to the next epoch."""
        ...


@dataclass
class Steps(IterableDataset[StepBatch]):
    """Inputs and targets of the steps `start` to `stop` of a run, for one process.

    A step has `n_lanes` batches over all processes, numbered by lane. The masks of a batch depend on seed, step and lane,
    and not on the process that computes it.

    Attributes
    ----------
    sources
        Source of batches for each lane of this process.
    lanes
        Numbers of these lanes.
    objective
        The objective, which returns inputs and targets for a batch.
    device
        Where batches go; None for the CPU. Batches for a GPU are made ahead of their steps in another thread, and pinned.
    """

    sources: Sequence[Source]
    lanes: Sequence[int]
    objective: objectives.Objective
    seed: int
    stop: int
    n_lanes: int = 1
    start: int = 0
    device: torch.device | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        to_gpu = self.device is not None and self.device.type == "cuda"
        return _ahead(self._batches()) if to_gpu else self._batches()

    def _batches(self) -> Iterator[StepBatch]:
        batches = [_endless(source, self.start) for source in self.sources]
        for step in range(self.start, self.stop):
            for lane, of_lane in zip(self.lanes, batches):
                generator = torch.Generator().manual_seed(step_seed(self.seed, step * self.n_lanes + lane))
                yield self.objective.corrupt(next(of_lane), generator)

    def __len__(self) -> int:
        # The length of the complete run, because Lightning continues the count of batches in a resumed run.
        return self.stop * len(self.lanes)


def pinned(batch: StepBatch) -> StepBatch:
    """The batch with the layouts of its plans, in memory from which a GPU reads while the host does other things."""
    inputs, targets = batch
    return inputs.planned().pin_memory(), {name: value.pin_memory() for name, value in targets.items()}


def sent(batch: StepBatch, device: torch.device) -> StepBatch:
    """The batch on another device; the host does not wait for pinned ones."""
    inputs, targets = batch
    return (
        inputs.to(device, non_blocking=True),
        {name: value.to(device, non_blocking=True) for name, value in targets.items()},
    )


def _ahead(batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """The same batches, pinned, `N_AHEAD` of them made before they are asked for."""

    def make() -> StepBatch | None:
        batch = next(batches, None)
        return None if batch is None else pinned(batch)

    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(make) for _ in range(N_AHEAD))
        while (batch := coming.popleft().result()) is not None:
            coming.append(pool.submit(make))
            yield batch


def _endless(source: Source, step: int) -> Iterator[CellBatch]:
    source.seek(step)
    while True:
        is_empty = True
        for cells in source:
            is_empty = False
            yield cells
        if is_empty:
            raise EmptyCellError(
                "There is no cell to train on, because no cell expresses a gene of the vocabulary. Check the names of the genes "
                "with `scfm.pp.check`."
            )


class MemorySource:
    """Batches of encoded cells in memory, over any number of epochs."""

    def __init__(self, cells: CellBatch, sampler: TokenBudgetSampler) -> None:
        self.cells, self.sampler = cells, sampler

    def seek(self, step: int) -> None:
        self.sampler.seek(step)

    def __iter__(self) -> Iterator[CellBatch]:
        for rows in self.sampler:
            yield self.cells.select(rows)


def step_seed(seed: int, number: int) -> int:
    """Return a seed of 63 bits for each (seed, number), by the finalizer of SplitMix64."""
    state = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 - 0x9E3779B97F4A7C15) & (2**64 - 1)
    return int(mix(np.array([state], dtype=np.uint64))[0]) >> 1
