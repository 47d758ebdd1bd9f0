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
    """Weighted sum of the means of all terms, a scalar.

    Parameters
    ----------
    loss
        Terms by name, as `Objective.loss` returns them.

    Examples
    --------
    >>> import torch, scfm
    >>> term = scfm.objectives.Term(sum=torch.tensor(6.0), count=torch.tensor(3.0), weight=0.5)
    >>> scfm.objectives.total({"a": term, "b": term})
    tensor(2.)
    """
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
    """Return the objective as it is at an optimiser step: itself, unless it has an `at_step` that says otherwise.

    Parameters
    ----------
    objective
        Any objective.
    step
        Optimiser step, from 0.

    Examples
    --------
    >>> import torch, scfm
    >>> objective = scfm.objectives.Generative(is_gene_V=torch.arange(9) > 1, second_pass_from=1000)
    >>> [scfm.objectives.at_step(objective, step).second_pass for step in (999, 1000)]
    [False, True]
    """
    change = getattr(objective, "at_step", None)
    return objective if change is None else change(step)


def count_of(tensor: Tensor) -> Tensor:
    """Number of elements as a tensor on the same device, without a synchronisation."""
    return torch.full((), tensor.numel(), dtype=torch.float32, device=tensor.device)
