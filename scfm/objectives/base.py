"""What an objective is: how it corrupts a batch, and what it charges for the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer

Targets = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One addend of a loss: a sum over `count` targets, kept apart so that ranks can add both before dividing."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0

    @property
    def mean(self) -> Tensor:
        return self.sum / torch.where(self.count > 0, self.count, 1.0)


Loss = dict[str, Term]


def total(loss: Loss) -> Tensor:
    """Weighted sum of the means of all terms, a scalar."""
    return torch.stack([term.weight * term.mean for term in loss.values()]).sum()


class Objective(Protocol):
    """A training objective. To add one, write these two methods in a file of its own.

    One that changes in the course of a run also has `at_step(step)`, which returns it as it is at an optimiser step.
    """

    @property
    def name(self) -> str: ...

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        """Make the network's input and its targets; runs on the host, all randomness comes from `generator`."""
        ...

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        """Run the network and score its answer."""
        ...


def at_step(objective: Objective, step: int) -> Objective:
    """Return the objective as it is at an optimiser step: itself, unless it has an `at_step` that says otherwise."""
    change = getattr(objective, "at_step", None)
    return objective if change is None else change(step)


def count_of(tensor: Tensor) -> Tensor:
    """Number of elements as a tensor on the same device, without a synchronisation."""
    return torch.full((), tensor.numel(), dtype=torch.float32, device=tensor.device)
