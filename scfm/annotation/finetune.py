"""Fine-tuning a model for cell-type annotation: class head, gene classifier, ensemble weights, calibration."""

# Axes: B cells, V tokens of the vocabulary, X inputs of the class head, C classes.

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm.annotation.calibration import calibrate, distances, has_distances, typical_distance
from scfm.annotation.ensemble import fit_ensemble_weights
from scfm.annotation.gene_classifier import fit_gene_classifier
from scfm.annotation.probe import start_from_probe
from scfm.annotation.scores import Row, score_row
from scfm.annotation.splits import FitSplit
from scfm.data import CellBatch
from scfm.models.initialize import sample_rows
from scfm.models.model import Model, Precision
from scfm.models.network import CellTransformer
from scfm.objectives import Classification, class_weights
from scfm.train import FitConfig, run_stage
from scfm.train.config import STAGE_DEFAULTS
from scfm.train.precision import resolved_precision

# Models up to this size are fine-tuned whole: on two CPU cores a step still takes seconds.
MAX_PARAMETERS_TO_TRAIN_ALL = 20_000_000
# Fewer labeled cells than this per class do not constrain the weights of a large network.
MIN_CELLS_PER_CLASS_FOR_LORA = 5
# Peak learning rates. The class head starts from a linear probe, so all weights move by small steps.
LEARNING_RATES = {"all": 1e-4, "last": 1e-4, "lora": 5e-4, "head": 1e-3}


@dataclass(frozen=True, eq=False)
class Cells:
    """What annotation learns from: all cells, as tokens and as log-expression, and the part that each one plays.

    Attributes
    ----------
    tokens
        All cells, encoded by the model's encoding.
    expression_BV
        log1p counts per 10,000 by token id, shape (B, V).
    split
        Which cells train, calibrate and test.
    """

    tokens: CellBatch
    expression_BV: sparse.csr_matrix
    split: FitSplit

    @property
    def train_labels_B(self) -> NDArray[np.int64]:
        assert self.split.labels is not None
        return self.split.labels.codes[self.split.train]

    def training_tokens(self) -> CellBatch:
        """Return the training cells with their labels."""
        return self.tokens.select(self.split.train).replace(labels_B=torch.from_numpy(self.train_labels_B))


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the finished network gives for all cells: class features (B, X) and logits (B, C)."""

    features_BX: NDArray[np.float32]
    logits_BC: torch.Tensor


def default_trainable(network: CellTransformer, labels_B: NDArray[np.int64]) -> str:
    """Choose which weights are fine-tuned, by the size of the network and the number of labeled cells.

    Networks of up to 20 million parameters: "all". Larger ones: "lora:8", or "head" with fewer than five labeled cells
    per class.
    """
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    if n_parameters <= MAX_PARAMETERS_TO_TRAIN_ALL:
        return "all"
    per_class = len(labels_B) / max(1, len(np.unique(labels_B)))
    return "lora:8" if per_class >= MIN_CELLS_PER_CLASS_FOR_LORA else "head"


def stage_config(config: FitConfig | None, network: CellTransformer, cells: Cells, seed: int) -> FitConfig:
    """Complete the settings of fine-tuning: steps by the number of cells, weights and learning rate by the network."""
    labels_B = cells.train_labels_B
    if config is None:
        config = FitConfig.for_cells(len(labels_B))
        config = config.replace(n_steps=max(15, config.n_steps // 2))
    config = config.with_defaults(trainable=default_trainable(network, labels_B), seed=seed)
    assert config.trainable is not None
    return config.with_defaults(learning_rate=LEARNING_RATES[config.trainable.partition(":")[0]])


def finetune(model: Model, cells: Cells, config: FitConfig, *, seed: int, progress: bool) -> Outputs:
    """Fit both ensemble members on the training cells and calibrate them; `model` is changed in place.

    The transformer starts from a linear probe on its frozen embedding, unless its class head already predicts the same
    labels; then it starts from that head.

    Parameters
    ----------
    model
        Pretrained, or already with a class head.
    cells
        All cells.
    config
        Complete settings of the stage (`stage_config`).
    seed
        Seed of the decomposition and of the folds.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Class features and logits of all cells from the finished network.
    """
    split, labels_B = cells.split, cells.train_labels_B
    assert split.labels is not None
    network, training = model.network, cells.training_tokens()
    has_head = set_labels(model, split.labels.names)
    component_BR = _fit_gene_classifier(model, cells, seed)
    features_BX = model.class_features(training, precision=inference_precision(config))
    if not has_head:
        start_from_probe(network, features_BX, labels_B)
    fit_ensemble_weights(network, features_BX, component_BR, labels_B, seed=seed)
    train_classifier(model, training, config, progress=progress)
    outputs = class_outputs(model, cells, inference_precision(config))
    model.calibration = calibrate(model, outputs.logits_BC, cells.expression_BV, split)
    if has_distances(model) and len(split.calibration):
        distance_B = distances(model, outputs.features_BX[split.calibration])
        model.calibration = dataclasses.replace(model.calibration, typical_distance=typical_distance(distance_B))
    return outputs


def set_labels(model: Model, labels: tuple[str, ...]) -> bool:
    """Give the model a class head for `labels`; returns whether it already had one for exactly these.

    An existing head is kept if it predicts the same classes of cells in the same order.
    """
    network = model.network
    if network.class_head is not None and model.labels == labels and network.config.classes.kind != "token":
        network.add_gene_classifier()
        return True
    model.labels = labels
    network.add_class_head(len(labels))
    return False


def train_classifier(model: Model, training: CellBatch, config: FitConfig, *, progress: bool) -> None:
    """Train the network on labeled cells with class-weighted cross-entropy."""
    assert training.labels_B is not None
    objective = Classification(class_weights_C=class_weights(training.labels_B, len(model.labels)))
    run_stage(model, "fine-tuning", objective, training, config, progress=progress)


def inference_precision(config: FitConfig) -> Precision:
    """Return the precision of passes without gradients in a stage of training."""
    return "bf16" if resolved_precision(config).startswith("bf16") else "fp32"


def class_outputs(model: Model, cells: Cells, precision: Precision) -> Outputs:
    """Run the finished network once over all cells; the head's statistics are set to those of the training cells."""
    features_BX = model.class_features(cells.tokens, precision=precision)
    head = model.network.class_head
    if hasattr(head, "set_statistics"):
        head.set_statistics(torch.from_numpy(features_BX[cells.split.train]))
    return Outputs(features_BX, model.logits_of_features(features_BX, cells.tokens))


def score_from_scratch(model: Model, cells: Cells, config: FitConfig, *, progress: bool) -> Row:
    """Train the architecture of `model` from random weights with the same budget, and score it on the test cells."""
    assert config.seed is not None
    config = config.replace(**{**STAGE_DEFAULTS, "seed": config.seed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        shape = model.network.config.replace(embedding={"train_genes": True})
        network = CellTransformer.for_vocabulary(shape, model.encoding.vocabulary).to(model.device)
    scratch = Model(network, model.encoding, labels=model.labels)
    train_classifier(scratch, cells.training_tokens(), config, progress=progress)
    outputs = class_outputs(scratch, cells, inference_precision(config))
    scratch.calibration = calibrate(scratch, outputs.logits_BC, cells.expression_BV, cells.split)
    test = cells.split.test
    return score_row("same architecture from scratch", scratch.proba_of_logits(outputs.logits_BC[test]), cells.split)


def _fit_gene_classifier(model: Model, cells: Cells, seed: int) -> NDArray[np.float64]:
    split = cells.split
    assert split.labels is not None
    rows = sample_rows(split.fitted, seed, keep=split.train)
    codes_B = np.where(np.isin(rows, split.train), split.labels.codes[rows], -1)
    return fit_gene_classifier(model.network, cells.expression_BV[rows], codes_B, seed=seed)
