"""The protocol of training objectives, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from scfm._registry import Registry
from scfm.data.batch import CellBatch
from scfm.models.initialize import N_COMPONENTS, start_from_loadings
from scfm.models.network import CellTransformer

if TYPE_CHECKING:
    from scfm.encoding import Encoding

Targets = dict[str, Any]  # tensors, and plans of attention that were made ahead


@dataclass(frozen=True)
class Term:
    """One term of a loss: a sum over `count` targets, and its weight. Sum and count are separate so that means over several
    batches are exact.
    """

    sum: Tensor
    count: Tensor
    weight: float = 1.0

    @property
    def mean(self) -> Tensor:
        return self.sum / torch.where(self.count > 0, self.count, 1.0)


Loss = dict[str, Term]


def total(loss: Loss) -> Tensor:
    """Return the weighted sum of the means of all terms, a scalar.

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
    """A training objective. A new objective is a class with these two methods, in a new file.

    An objective that changes during training also has a method `at_step(step)`, which returns the objective for a step. An
    objective with weights that only training needs, such as a decoder, has an attribute `weights`, a torch module: they are
    trained and kept in checkpoints, and are no part of the model.
    """

    @property
    def name(self) -> str: ...

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        """Return the input of the network and the targets. It runs on the CPU; all random numbers are from `generator`."""
        ...

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        """Run the network, and return the terms of the loss."""
        ...


def at_step(objective: Objective, step: int) -> Objective:
    """Return the objective for an optimizer step: the result of its method `at_step`, or itself if it has none.

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


def weights_of(objective: Objective) -> nn.Module | None:
    """Return the weights that an objective has besides those of the network, or None."""
    return getattr(objective, "weights", None)


@dataclass(frozen=True, kw_only=True)
class PretrainingObjective:
    """An entry of `OBJECTIVES`: a function that makes an objective, and the settings that it needs.

    Attributes
    ----------
    make
        Function that returns the objective for a network and its encoding.
    network_settings
        Fields of `ModelConfig` that the objective needs.
    encoding_settings
        Fields of `EncodingConfig` that the objective needs during training only.
    training_settings
        Fields of `FitConfig` that differ from the defaults of pretraining.
    start
        Function that initializes a network from loadings (V, R) and total counts (V,) of the genes.
    n_components
        Number of loadings R, at most.
    residuals
        Whether the loadings are those of Pearson residuals, scaled by their strength. Otherwise, they are right singular vectors
        of log-normalized expression.
    """

    make: Callable[[CellTransformer, Encoding], Objective]
    network_settings: Mapping[str, Any] = field(default_factory=dict)
    encoding_settings: Mapping[str, Any] = field(default_factory=dict)
    training_settings: Mapping[str, Any] = field(default_factory=dict)
    start: Callable[..., None] = start_from_loadings
    n_components: int = N_COMPONENTS
    residuals: bool = False


OBJECTIVES: Registry[PretrainingObjective] = Registry("objective", "scfm.objectives")


def make_objective(name: str, network: CellTransformer, encoding: Encoding) -> Objective:
    """Make a pretraining objective by its name.

    Parameters
    ----------
    name
        A name in `scfm.objectives.OBJECTIVES`, such as `Preset.objective`.
    network
        The network to train. If it also predicts values from cell embeddings, the loss includes this term (MVC).
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
    >>> scfm.objectives.make_objective(preset.objective, network, encoding).target_fractions
    (0.25, 0.5, 0.75)
    """
    if name not in OBJECTIVES:
        raise ValueError(f"`name` is {name!r}; choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name].make(network, encoding)


def special_token(encoding: Encoding, role: str) -> int:
    """Return the id of a special token that the objective needs."""
    token = encoding.vocabulary.special_id(role)
    if token is None:
        raise ValueError(
            f"The vocabulary has no {role!r} token (special: {dict(encoding.vocabulary.special)}), which this objective "
            "needs. Build a vocabulary with this token: `Vocabulary.from_genes(names, special=[...])`."
        )
    return token


def count_of(tensor: Tensor) -> Tensor:
    """Return the number of elements as a tensor on the same device, without synchronizing with the device."""
    return torch.full((), tensor.numel(), dtype=torch.float32, device=tensor.device)
