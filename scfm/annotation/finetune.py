"""Fine-tuning a model for cell-type annotation: class head, gene classifier, ensemble weights, calibration."""

# Axes: B cells, V tokens of the vocabulary, X inputs of the class head, C classes.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm.annotation.adapt import N_COMPONENTS
from scfm.annotation.calibration import fit_temperature
from scfm.annotation.ensemble import fit_weights, member_shares
from scfm.annotation.gene_classifier import GeneMembers, component_importance, max_scales
from scfm.annotation.novelty import N_COMPONENTS as N_NOVELTY_COMPONENTS
from scfm.annotation.novelty import fit_gaussians, group_threshold, standardize
from scfm.annotation.probe import balanced_rows, start_from_probe
from scfm.annotation.scores import Row, score_row
from scfm.annotation.splits import FitSplit
from scfm.data import CellBatch
from scfm.models.initialize import sample_rows
from scfm.models.model import Model, Precision
from scfm.models.network import CellTransformer
from scfm.models.state import Calibration
from scfm.nn.novelty import ClassGaussians
from scfm.objectives import Classification, class_weights
from scfm.train import FitConfig, run_stage
from scfm.train.config import CPU_TOKENS_PER_STEP, STAGE_DEFAULTS
from scfm.train.precision import resolved_precision

# All weights of models up to this size are fine-tuned: even on two CPU cores a step takes only seconds.
MAX_PARAMETERS_TO_TRAIN_ALL = 20_000_000
# With fewer labeled cells per class than this, only the head of a large network is trained.
MIN_CELLS_PER_CLASS_FOR_LORA = 5
MAX_PROBE_CELLS = 1000
MAX_CELLS_FOR_LINEAR_PARTS = 20_000  # training, calibration and unlabeled cells each, whose expression is in memory
# Default cells per step. More cells per step of pretraining do not improve the transformer that is fine-tuned afterwards.
CELLS_PER_STEP = {"pretraining": 16, "fine-tuning": 32}
# Peak learning rates. They are small because the class head starts from a linear probe.
LEARNING_RATES = {"all": 1e-4, "last": 1e-4, "lora": 5e-4, "head": 1e-3}


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells that annotation learns from, as tokens, and their split; log-expression is read for the cells that need it.

    Attributes
    ----------
    tokens
        All cells, encoded by the model's encoding.
    expression
        Returns log1p of counts per 10,000 by token id, shape (rows, V), of the rows that it is given.
    split
        Which cells are for training, for calibration and for tests.
    """

    tokens: CellBatch
    expression: Callable[[NDArray[np.int64]], sparse.csr_matrix]
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
    """Outputs of the fine-tuned network for all cells: class features (B, X) and logits (B, C)."""

    features_BX: NDArray[np.float32]
    logits_BC: torch.Tensor


def default_trainable(network: CellTransformer, labels_B: NDArray[np.int64]) -> str:
    """Choose which weights are fine-tuned, by the size of the network and the number of labeled cells.

    The result is "all" for networks of up to 20 million parameters. For larger ones it is "lora:8", or "head" if there are
    fewer than five labeled cells per class.
    """
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    if n_parameters <= MAX_PARAMETERS_TO_TRAIN_ALL:
        return "all"
    per_class = len(labels_B) / max(1, len(np.unique(labels_B)))
    return "lora:8" if per_class >= MIN_CELLS_PER_CLASS_FOR_LORA else "head"


def short_stage(stage: str, n_cells: int, tokens: CellBatch) -> dict[str, int]:
    """Return the default length of a stage of annotation, as fields of `FitConfig`: few steps of 16 or 32 cells.

    The number of steps grows with the square root of the number of cells and is at least 30. In our benchmarks, more steps or
    more tokens per step do not change the predictions of the ensemble.
    """
    tokens_per_step = min(max(CELLS_PER_STEP[stage] * int(tokens.lengths_B.max()), 1024), CPU_TOKENS_PER_STEP)
    return {"n_steps": int(min(max(0.75 * n_cells**0.5, 30), 4000)), "tokens_per_step": tokens_per_step}


def stage_config(config: FitConfig | None, network: CellTransformer, cells: Cells, seed: int) -> FitConfig:
    """Fill in missing settings of fine-tuning: number and size of steps, trainable weights, learning rate and seed."""
    labels_B = cells.train_labels_B
    length = short_stage("fine-tuning", len(labels_B), cells.tokens)
    config = (config or FitConfig()).with_defaults(**length, trainable=default_trainable(network, labels_B), seed=seed)
    assert config.trainable is not None
    return config.with_defaults(learning_rate=LEARNING_RATES[config.trainable.partition(":")[0]])


def finetune(model: Model, cells: Cells, config: FitConfig, *, seed: int, progress: bool) -> Outputs:
    """Fit the members of the ensemble on the training cells and calibrate them; `model` is changed in place.

    If the class head of the model already predicts the same labels, training starts from that head. Otherwise the head starts
    from a linear probe on the frozen embedding.

    Parameters
    ----------
    model
        A pretrained model, with or without a class head.
    cells
        All cells.
    config
        Complete settings of the stage (`stage_config`).
    seed
        Seed of the principal components and of the cross-validation folds.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Class features and logits of all cells from the fine-tuned network.
    """
    split, labels_B = cells.split, cells.train_labels_B
    assert split.labels is not None
    training = cells.training_tokens()
    has_head = set_labels(model, split.labels.names)
    if not has_head:
        rows = balanced_rows(labels_B, MAX_PROBE_CELLS, seed)
        features_BX = model.class_features(training.select(rows), precision=inference_precision(config))
        start_from_probe(model.network, features_BX, labels_B[rows])
    train_classifier(model, training, config, progress=progress)
    outputs = class_outputs(model, cells, inference_precision(config), progress=progress)
    fit_linear_parts(model, cells, outputs.logits_BC, seed=seed)
    return outputs


@torch.no_grad()
def fit_linear_parts(model: Model, cells: Cells, logits_BC: torch.Tensor, *, seed: int) -> None:
    """Fit the gene classifier, the weights of the ensemble, the temperatures and the novelty score; `model` is changed.

    The weights are fitted on the calibration cells, on which no member was fitted. Then the linear members are fitted
    again, on training and calibration cells together, so that all labels are used, or those of 20,000 cells of each part.
    """
    split, network = cells.split.limited(MAX_CELLS_FOR_LINEAR_PARTS, seed), model.network
    classifier, labels = network.gene_classifier, split.labels
    assert classifier is not None
    assert labels is not None
    learn = np.union1d(split.train, split.calibration)
    rows = sample_rows(split.fitted, seed, keep=learn)
    rows_of_learn, train, held = (np.searchsorted(rows, part) for part in (learn, split.train, split.calibration))
    is_fitted_B = np.isin(rows, split.calibration, invert=True) | split.transductive
    expression_BV = cells.expression(rows)
    fitted_BV = expression_BV[is_fitted_B]
    classifier.scale_V.copy_(torch.from_numpy(max_scales(fitted_BV)))
    scaled_BV = classifier.scaled(expression_BV)
    codes_B = np.where(np.isin(rows, learn), labels.codes[rows], -1)
    importance_V = component_importance(fitted_BV, classifier.scale_V.cpu().numpy())
    members = GeneMembers(scaled_BV, codes_B, importance_V, is_fitted_B, seed=seed)
    linear = members.fit(train)

    held_logits_BC = logits_BC[split.calibration]
    logits = [held_logits_BC.numpy(), *(member.logits(scaled_BV[held]) for member in linear)]
    weights = fit_weights(logits, codes_B[held], member_shares(cells.train_labels_B))
    uncalibrated_BC = model.proba_of_logits(held_logits_BC, calibrated=False)
    novelty = _fit_novelty(network, split, expression_BV[train], members)
    model.calibration = Calibration(
        n_cells=len(held),
        transformer_temperature=fit_temperature(uncalibrated_BC, codes_B[held]),
        ensemble_temperature=1 / float(weights.sum()),
        novelty_threshold=standardize(novelty, expression_BV[held]),
        group_novelty_threshold=group_threshold(
            novelty, expression_BV[held], members.component_BR[held, :N_COMPONENTS]
        ),
    )
    if len(held):
        linear = members.fit(rows_of_learn)
    classifier.set_members(linear, weights / weights.sum())


def _fit_novelty(
    network: CellTransformer, split: FitSplit, train_BV: sparse.csr_matrix, members: GeneMembers
) -> ClassGaussians:
    """Fit the Gaussians of the classes on training cells."""
    classifier = network.gene_classifier
    assert classifier is not None
    assert split.labels is not None
    loading_RV = members.loading_RV[:N_NOVELTY_COMPONENTS] * classifier.scale_V.cpu().numpy()
    network.add_novelty(len(loading_RV))
    assert network.novelty is not None
    genes = np.flatnonzero(loading_RV.any(0))
    fit_gaussians(
        network.novelty,
        expression_BV=train_BV,
        labels_B=split.labels.codes[split.train],
        loading_VR=loading_RV.T,
        genes=genes,
    )
    return network.novelty


def set_labels(model: Model, labels: tuple[str, ...]) -> bool:
    """Give the model a class head for `labels`, and return whether it already had one for these labels.

    An existing head is kept if it predicts the same classes in the same order.
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
    run_stage(model, "fine-tuning", objective=objective, cells=training, config=config, progress=progress)


def inference_precision(config: FitConfig) -> Precision:
    """Return the precision of the forward passes without gradients that belong to a training stage."""
    return "bf16" if resolved_precision(config).startswith("bf16") else "fp32"


def class_outputs(model: Model, cells: Cells, precision: Precision, *, progress: bool) -> Outputs:
    """Run the fine-tuned network on all cells, after setting the head's statistics to those of the training cells."""
    features_BX = model.class_features(cells.tokens, precision=precision, progress=progress)
    head = model.network.class_head
    if hasattr(head, "set_statistics"):
        head.set_statistics(torch.from_numpy(features_BX[cells.split.train]))
    return Outputs(features_BX, model.logits_of_features(features_BX, cells.tokens))


def score_from_scratch(model: Model, cells: Cells, config: FitConfig, *, progress: bool) -> Row:
    """Train the architecture of `model` from random weights with the same settings, and score it on the test cells."""
    assert config.seed is not None
    config = config.replace(**{**STAGE_DEFAULTS, "n_steps": config.n_steps, "seed": config.seed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        shape = model.network.config.replace(embedding={"train_genes": True})
        network = CellTransformer.for_vocabulary(shape, model.encoding.vocabulary).to(model.device)
    scratch = Model(network, model.encoding, labels=model.labels)
    train_classifier(scratch, cells.training_tokens(), config, progress=progress)
    outputs = class_outputs(scratch, cells, inference_precision(config), progress=progress)
    held, labels = cells.split.calibration, cells.split.labels
    assert labels is not None
    proba_BC = scratch.proba_of_logits(outputs.logits_BC[held], calibrated=False)
    temperature = fit_temperature(proba_BC, labels.codes[held])
    scratch.calibration = Calibration(n_cells=len(held), transformer_temperature=temperature)
    test = cells.split.test
    return score_row("same architecture from scratch", scratch.proba_of_logits(outputs.logits_BC[test]), cells.split)
