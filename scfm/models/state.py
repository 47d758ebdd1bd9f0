"""The saved parts of a model: network, encoding, labels, calibration, scores and history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from scfm._config import Config
from scfm.encoding import Encoding
from scfm.models.identity import model_id
from scfm.models.network import CellTransformer

Precision = Literal["fp32", "bf16"]


def require_precision(precision: str) -> None:
    """Raise `ValueError` unless `precision` is a `Precision`."""
    if precision not in get_args(Precision):
        raise ValueError(f"`precision` is {precision!r}; choose one of {', '.join(get_args(Precision))}.")


@dataclass(frozen=True, kw_only=True)
class Calibration(Config):
    """Values that were fitted on the calibration cells, which are not used for training.

    Attributes
    ----------
    n_cells
        Number of calibration cells.
    transformer_temperature, ensemble_temperature
        Divisors of the log-probabilities of the transformer alone, and of its ensemble with the gene classifier.
    novelty_threshold
        Novelty below which 95 of 100 cells of known classes lie; None if it was not measured.
    group_novelty_threshold
        The same for the novelty of groups of similar cells (`scfm.tl.annotate(adapt=True)`); None if it was not measured.
    """

    n_cells: int
    transformer_temperature: float = 1.0
    ensemble_temperature: float = 1.0
    novelty_threshold: float | None = None
    group_novelty_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("transformer_temperature", "ensemble_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Calibration.{name} is {getattr(self, name)}; it must be positive and finite.")
        for name in ("novelty_threshold", "group_novelty_threshold"):
            threshold = getattr(self, name)
            if threshold is not None and not math.isfinite(threshold):
                raise ValueError(f"Calibration.{name} is {threshold}; it must be finite.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, without the newest if it is None, so that the id of an older model stays the same."""
        content = super().to_dict()
        if self.group_novelty_threshold is None:
            del content["group_novelty_threshold"]
        return content


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Config):
    """The published checkpoint that a model was read from.

    Attributes
    ----------
    family
        Name of the family in `scfm.families`.
    unused
        Tensors of the checkpoint that the network does not use, by name, with the reason.
    settings
        Further content of the checkpoint that the family needs to write it again, as JSON values.
    """

    family: str
    unused: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class ModelState:
    """The saved parts of a model; `scfm.Model` adds the methods.

    Attributes
    ----------
    network
        The transformer, a `torch.nn.Module`.
    encoding
        The encoding: settings, vocabulary, medians.
    labels
        Names of the classes that the network predicts; empty if it was not trained to classify.
    calibration
        Temperatures for calibrated probabilities, and the threshold of the novelty score; None if the model was not
        calibrated.
    scores
        Rows of `Model.report`; None if the model was fitted without labels.
    objective
        Name of the objective that the network was pretrained with, in `scfm.objectives`; None if it was not pretrained.
    checkpoint
        The published checkpoint that the model was read from, if any.
    history
        Record of the settings and losses of each training stage, as JSON values. It does not affect predictions.
    """

    network: CellTransformer
    encoding: Encoding
    labels: tuple[str, ...] = field(default=(), kw_only=True)
    calibration: Calibration | None = field(default=None, kw_only=True)
    scores: list[dict[str, Any]] | None = field(default=None, kw_only=True)
    objective: str | None = field(default=None, kw_only=True)
    checkpoint: Checkpoint | None = field(default=None, kw_only=True)
    history: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        self.network.eval()
        self.labels = tuple(self.labels)
        self.history = self.history or {}

    @property
    def device(self) -> torch.device:
        return self.network.embedding.gene.weight.device

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of a hash of everything that affects predictions.

        The hash covers weights, settings of network and encoding, vocabulary with aliases, medians, labels and calibration.
        It does not cover scores and history.
        """
        return model_id(self)

    def __repr__(self) -> str:
        config = self.network.config
        labels = f", {len(self.labels)} labels" if self.labels else ""
        return (
            f"Model({self.encoding.config.kind} encoding, {len(self.encoding.vocabulary):,} tokens, "
            f"{config.n_layers} layers, width {config.d_model}, {self.n_parameters:,} parameters{labels})"
        )
