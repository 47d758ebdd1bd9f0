"""The start of a pretraining run: encoding, objective, and initial network."""

# Axes: B cells, V tokens of the vocabulary.

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from scfm.encoding import EncodingConfig, Vocabulary, read_medians, read_vocabulary
from scfm.families import Preset, choose_preset, presets
from scfm.models import CellTransformer, Model
from scfm.objectives import OBJECTIVES
from scfm.train.config import STAGE_DEFAULTS
from scfm.train.statistics import Data, Learning, Statistics

LEARNING_RATE, EMBEDDING_SCALE = 3e-4, 0.1  # at 1e-3, embeddings of PBMC 3k got worse; not settled on other studies


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """The start of a run: a preset, or the network of a model."""

    encoding: EncodingConfig
    objective: str
    preset: Preset | None = None
    base: Model | None = None
    init: str | None = None
    vocabulary: Vocabulary | None = None
    medians: NDArray[np.float64] | None = None

    @property
    def training_encoding(self) -> EncodingConfig:
        return self.encoding.replace(**OBJECTIVES[self.objective].encoding_settings)

    @property
    def stage_defaults(self) -> dict[str, Any]:
        """Return default settings of training; initialized gene embeddings get a lower learning rate."""
        scale = 1.0 if self.init is None else EMBEDDING_SCALE
        defaults = {**STAGE_DEFAULTS, "learning_rate": LEARNING_RATE, "embedding_learning_rate_scale": scale}
        return {**defaults, **OBJECTIVES[self.objective].training_settings}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that identify this start, as JSON values."""
        medians = None if self.medians is None else hashlib.sha256(self.medians.tobytes()).hexdigest()
        return {
            "preset": None if self.preset is None else self.preset.name,
            "encoding": self.encoding.to_dict(),
            "objective": self.objective,
            "init": self.init,
            "vocabulary": None if self.vocabulary is None else self.vocabulary.fingerprint,
            "medians": medians,
        }

    def learning(self, data: Data, held_out_B: NDArray[np.bool_], seed: int) -> Learning:
        """Return what is to be learned from the files."""
        objective = OBJECTIVES[self.objective]
        return Learning(
            data=data,
            config=self.training_encoding,
            held_out_B=held_out_B,
            vocabulary=self.vocabulary,
            medians=self.medians,
            n_components=objective.n_components if self.init == "svd" else 0,
            residuals=objective.residuals,
            seed=seed,
        )

    def network(self, statistics: Statistics, seed: int) -> CellTransformer:
        """Return the initial network."""
        vocabulary = statistics.vocabulary
        if self.base is not None:
            network = copy.deepcopy(self.base.network)
            network.remove_class_head()
            return network
        assert self.preset is not None
        # scBERT's gene embedding is frozen, because it is from gene2vec; here it is initialized differently, so it is trained.
        config = self.preset.model_config(
            n_tokens=len(vocabulary), pad_id=vocabulary.pad_id, embedding={"train_genes": True}
        )
        if self.encoding.context_length is not None:
            config = config.replace(context_length=self.encoding.context_length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = CellTransformer.for_vocabulary(config, vocabulary)
        if statistics.loadings_VR.shape[1]:
            OBJECTIVES[self.objective].start(network, statistics.loadings_VR, statistics.totals_V, seed=seed)
        return network


def choose_start(
    init: Model | str | None,
    *,
    preset: str | None,
    encoding: str | EncodingConfig | None,
    objective: str | None,
    vocabulary: Vocabulary | str | Path | None,
    medians: ArrayLike | str | Path | None,
) -> Start:
    if isinstance(init, Model):
        return _continued(init, objective, preset=preset, encoding=encoding, vocabulary=vocabulary, medians=medians)
    kind = encoding.kind if isinstance(encoding, EncodingConfig) else encoding
    chosen = choose_preset(preset or "small", encoding=kind, objective=objective)
    if vocabulary is not None and not isinstance(vocabulary, Vocabulary):
        vocabulary = read_vocabulary(vocabulary)
    if medians is not None and vocabulary is None:
        raise ValueError("`medians` are indexed by token id. Pass the `vocabulary` that they belong to.")
    if isinstance(medians, str | Path):
        assert vocabulary is not None
        medians = read_medians(medians, vocabulary)
    return Start(
        preset=chosen,
        encoding=encoding if isinstance(encoding, EncodingConfig) else EncodingConfig(**chosen.encoding),
        objective=chosen.objective,
        init=init,
        vocabulary=vocabulary,
        medians=None if medians is None else np.asarray(medians, dtype=np.float64),
    )


def _continued(base: Model, objective: str | None, **given: Any) -> Start:
    """Return a start from a model, which is not changed."""
    if names := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"`init` is a model, whose {' and '.join(names)} cannot be changed. Omit `{names[0]}`.")
    chosen = base.objective
    if objective is not None or chosen is None:
        kind = base.encoding.config.kind
        same_kind = [preset for preset in presets() if preset.encoding["kind"] == kind]
        able = [preset for preset in same_kind if objective in preset.objectives] or same_kind
        chosen = able[0].for_objective(objective or "masked").objective
    return Start(
        base=base,
        encoding=base.encoding.config,
        objective=chosen,
        init=f"model {base.id}",
        vocabulary=base.encoding.vocabulary,
        medians=base.encoding.medians,
    )
