"""What an objective is: how it corrupts a batch, how it computes its loss, and how it is made for a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from scfm._registry import Registry
from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer

if TYPE_CHECKING:
    from scfm.encoding import Encoding

Targets = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One addend of a loss: a sum over `count` targets, kept apart so that the mean can be weighted."""

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

    One that changes in the course of a run also has `at_step(step)`, which returns it as it is at an optimizer step.
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
    """Return the objective as it is at an optimizer step: itself, unless it has an `at_step` that says otherwise.

    Parameters
    ----------
    objective
        Any objective.
    step
        Optimizer step, from 0.

    Examples
    --------
    >>> import torch, scfm
    >>> objective = scfm.objectives.Generative(is_gene_V=torch.arange(9) > 1, second_pass_from=1000)
    >>> [scfm.objectives.at_step(objective, step).second_pass for step in (999, 1000)]
    [False, True]
    """
    change = getattr(objective, "at_step", None)
    return objective if change is None else change(step)


@dataclass(frozen=True, kw_only=True)
class PretrainingObjective:
    """How an objective is made by name; the file of each pretraining objective adds one to `OBJECTIVES`.

    Attributes
    ----------
    make
        Makes it for a network and the encoding of its input.
    network_settings
        Fields of `ModelConfig` that the network needs for it.
    encoding_settings
        Fields of `EncodingConfig` that the cells need during training only.
    """

    make: Callable[[CellTransformer, Encoding], Objective]
    network_settings: Mapping[str, Any] = field(default_factory=dict)
    encoding_settings: Mapping[str, Any] = field(default_factory=dict)


OBJECTIVES: Registry[PretrainingObjective] = Registry("objective", "scfm.objectives")


def make_objective(name: str, network: CellTransformer, encoding: Encoding) -> Objective:
    """Make a pretraining objective by its name.

    Parameters
    ----------
    name
        A name in `scfm.objectives.OBJECTIVES`, as `Preset.objective` has it.
    network
        The network to train. If it also predicts values from cells, the loss of masked values includes that (MVC).
    encoding
        The encoding of its input: rank for masked genes, bucket for masked buckets, continuous for read depth.

    Examples
    --------
    >>> import scfm
    >>> encoding = scfm.encoding.make_encoding("bin", adata=scfm.datasets.pbmc())
    >>> preset = scfm.families.preset("small-bin").for_objective("generative")
    >>> network = scfm.models.CellTransformer.for_vocabulary(
    ...     preset.model_config(n_tokens=len(encoding.vocabulary)), encoding.vocabulary
    ... )
    >>> scfm.objectives.make_objective(preset.objective, network, encoding).unknown_shares
    (0.25, 0.5, 0.75)
    """
    if name not in OBJECTIVES:
        raise ValueError(f"`name` is {name!r}; choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name].make(network, encoding)


def special_token(encoding: Encoding, role: str) -> int:
    """Id of the special token of this role, which the objective needs."""
    token = encoding.vocabulary.special_id(role)
    if token is None:
        raise ValueError(
            f"The vocabulary has no {role!r} token (special: {dict(encoding.vocabulary.special)}), which this objective "
            "needs. Build it with one: `Vocabulary.from_genes(names, special=[...])`."
        )
    return token


def count_of(tensor: Tensor) -> Tensor:
    """Number of elements as a tensor on the same device, without a synchronization."""
    return torch.full((), tensor.numel(), dtype=torch.float32, device=tensor.device)
