"""How the blood model is fitted: a transformer and a regression on genes that is made for cells of other studies.

The regression differs from that of `scfm.fit` in two ways:

1. log1p of counts per 10,000 is limited: above the limit, more counts change nothing. The limit is chosen by leaving out each
   of the training studies in turn.
2. Directions in which studies differ within a type are reduced (within-class covariance normalization, Hatch et al. 2006).
   They are the differences of the mean of a type in one batch from its mean over batches. Unlabeled studies contribute too:
   their cells get the type that a first regression predicts for them with a probability of at least 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata
import blood_data
import numpy as np
import pandas as pd
import torch
from blood_data import LABELED, SOURCES, TYPES
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression

import scfm
from scfm.annotation.calibration import fit_temperature
from scfm.annotation.finetune import set_labels, train_classifier
from scfm.annotation.gene_classifier import LinearMember
from scfm.annotation.novelty import fit_gaussians
from scfm.annotation.probe import balanced_rows, softmax_weights, start_from_probe
from scfm.data import CellBatch
from scfm.models.network import CellTransformer
from scfm.models.state import Calibration
from scfm.nn.class_heads import MAX_SCALED

# Axes: B cells, V tokens of the vocabulary, K directions, R components, C classes.

N_GENES = 4500
CELLS_PER_TYPE = 50  # of each type in each file
UNLABELED_CELLS = 150  # of each batch without labels
MAX_TEST_CELLS = 600  # of each file
PROBE_CELLS = 500
CONTEXT_LENGTH = 128
PRETRAINING = scfm.FitConfig(n_steps=100, tokens_per_step=4096)
FINE_TUNING = scfm.FitConfig(n_steps=40, tokens_per_step=4096, learning_rate=1e-4, trainable="all", seed=0)
MAX_LOG = 9.3  # log1p of counts per 10,000 is at most 9.22
LIMITS = (3.0, MAX_LOG)  # candidates
INVERSE_PENALTY = 0.005
N_DIRECTIONS = 400
REDUCTION = 0.5  # a direction with singular value s is divided by sqrt(1 + REDUCTION * s^2)
MIN_CELLS_OF_MEAN = 8
MIN_CONFIDENCE = 0.9
NOVELTY_COMPONENTS = 30
KEPT_FRACTION = 0.95  # of the cells of known types, by the threshold of novelty
WEIGHTS = np.array([1, 27]) / 28  # of transformer and regression


@dataclass(frozen=True)
class Cells:
    """Cells of several files: log1p of counts per 10,000 (B, V); type ("" for none), batch, study and file; tokens."""

    expression_BV: sparse.csr_matrix
    obs: pd.DataFrame
    tokens: CellBatch

    def select(self, is_kept_B: NDArray[np.bool_]) -> Cells:
        rows = np.flatnonzero(is_kept_B)
        return Cells(self.expression_BV[rows], self.obs.iloc[rows], self.tokens.select(rows))

    def column(self, name: str) -> NDArray[np.object_]:
        return self.obs[name].to_numpy(dtype=object)

    @property
    def types_B(self) -> NDArray[np.object_]:
        return self.column("type")

    @property
    def names(self) -> tuple[str, ...]:
        """Types of the cells, in the order of `TYPES`."""
        return tuple(name for name in TYPES if name in set(self.types_B))


def sample(adata: anndata.AnnData, column: str, n_cells: int, rng: np.random.Generator) -> anndata.AnnData:
    """At most `n_cells` random cells of each value of a column, in their order."""
    order = rng.permutation(adata.n_obs)
    rank_B = adata.obs[column].iloc[order].groupby(adata.obs[column].iloc[order].to_numpy()).cumcount()
    return adata[np.sort(order[rank_B.to_numpy() < n_cells])].copy()


def read(names: list[str], folder: Path, encoding: object, *, seed: int, test: bool = False) -> Cells:
    """Training cells, cells without labels, or test cells (`test`) of files."""
    parts = []
    for name in names:
        adata = anndata.read_h5ad(blood_data.prepare(name, folder))
        rng = np.random.default_rng([seed, list(SOURCES).index(name)])
        if test:
            adata = adata[adata.obs["type"] != ""].copy()
            adata = adata[np.sort(rng.permutation(adata.n_obs)[:MAX_TEST_CELLS])].copy()
        elif name in LABELED:
            adata = sample(adata[adata.obs["type"].isin(TYPES)].copy(), "type", CELLS_PER_TYPE, rng)
        else:
            adata = sample(adata, "batch", UNLABELED_CELLS, rng)
        obs = adata.obs[["type", "batch"]].astype(object).assign(study=SOURCES[name].study, file=name)
        parts.append((scfm.pp.log_expression(adata, encoding), obs, scfm.pp.encode(adata, encoding)))
    expression, obs, tokens = zip(*parts)
    return Cells(sparse.vstack(expression, format="csr"), pd.concat(obs), CellBatch.concat(tokens))


def codes(types_B: NDArray, names: tuple[str, ...]) -> NDArray[np.int64]:
    return np.array([names.index(each) for each in types_B], dtype=np.int64)


def limited(expression_BV: sparse.csr_matrix, limit: float) -> NDArray[np.float32]:
    return np.minimum(expression_BV.toarray(), np.float32(limit))


@dataclass(frozen=True)
class Reduction:
    """Directions (K, V), and the fraction of each that is removed."""

    direction_KV: NDArray[np.float32]
    removed_K: NDArray[np.float32]

    @classmethod
    def of(cls, value_BV: NDArray, types_B: NDArray, batch_B: NDArray) -> Reduction:
        """Learn the directions in which batches differ within types."""
        shifts = []
        for name in np.unique(types_B):
            groups = [(types_B == name) & (batch_B == batch) for batch in np.unique(batch_B[types_B == name])]
            means = [value_BV[group].mean(0) for group in groups if group.sum() >= MIN_CELLS_OF_MEAN]
            shifts += [mean - np.mean(means, 0) for mean in means] if len(means) > 1 else []
        if not shifts:
            return cls(np.zeros((0, value_BV.shape[1]), np.float32), np.zeros(0, np.float32))
        _, strength_K, direction_KV = np.linalg.svd(np.array(shifts), full_matrices=False)
        removed_K = 1 - 1 / np.sqrt(1 + REDUCTION * strength_K**2)
        return cls(direction_KV.astype(np.float32), removed_K.astype(np.float32))

    def __call__(self, value_XV: NDArray) -> NDArray:
        """Reduce rows. The matrix is symmetric, so it also turns weights of reduced values into weights of values."""
        return value_XV - ((value_XV @ self.direction_KV.T) * self.removed_K) @ self.direction_KV


def fit_regression(known: Cells, unlabeled: Cells, limit: float) -> LinearMember:
    """Fit the regression on genes; its weights are those of limited log-expression."""
    value_BV, guess_BV = limited(known.expression_BV, limit), limited(unlabeled.expression_BV, limit)
    code_B = codes(known.types_B, known.names)
    reduction = Reduction.of(value_BV, known.types_B, known.column("batch"))
    first = regress(reduction(value_BV), code_B)
    proba_BC = softmax(first.logits(reduction(guess_BV)), axis=1)
    sure_B = proba_BC.max(1) >= MIN_CONFIDENCE
    guessed_B = np.array(known.names, dtype=object)[proba_BC.argmax(1)][sure_B]
    reduction = Reduction.of(
        np.concatenate([value_BV, guess_BV[sure_B]]),
        np.concatenate([known.types_B, guessed_B]),
        np.concatenate([known.column("batch"), unlabeled.column("batch")[sure_B]]),
    )
    last = regress(reduction(value_BV), code_B)
    return LinearMember(reduction(last.weight_VC.T).T, last.bias_C)


def regress(value_BV: NDArray, code_B: NDArray[np.int64]) -> LinearMember:
    """Balanced logistic regression on the leading singular vectors of the rows; with this penalty, the others matter little."""
    square_N, vectors_BN = np.linalg.eigh((value_BV @ value_BV.T).astype(np.float64))
    root_N, vectors_BN = np.sqrt(square_N[-N_DIRECTIONS:]), vectors_BN[:, -N_DIRECTIONS:]
    regression = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000, tol=1e-3)
    weight_CN, bias_C = softmax_weights(regression.fit((vectors_BN * root_N).astype(np.float32), code_B))
    return LinearMember(value_BV.T @ (vectors_BN / root_N) @ weight_CN.T, bias_C)


def choose_limit(known: Cells, unlabeled: Cells) -> float:
    """The limit with the best mean macro-F1 if each study of `known` is left out in turn."""
    scores = {}
    for limit in LIMITS:
        found = []
        for study in np.unique(known.column("study")):
            rest, held = known.select(known.column("study") != study), known.select(known.column("study") == study)
            member = fit_regression(rest, unlabeled.select(unlabeled.column("study") != study), limit)
            predicted_B = np.array(rest.names, dtype=object)[
                member.logits(limited(held.expression_BV, limit)).argmax(1)
            ]
            found.append(blood_data.scores(held.types_B, predicted_B, rest.names)["macro_f1"])
        scores[limit] = np.mean(found)
    return max(scores, key=scores.__getitem__)


def pretrain(study: str | None, folder: Path) -> scfm.Model:
    """Pretrain on all cells of the other studies; the vocabulary is that of the labeled ones. Resumes, or loads the result."""
    out = folder / "pretrained" / str(study)
    if (out / "model").exists():
        return scfm.load(out / "model")
    labeled = [blood_data.prepare(name, folder / "cells") for name in blood_data.without(study, labeled=True)]
    others = [blood_data.prepare(name, folder / "cells") for name in blood_data.without(study, labeled=False)]
    found = blood_data.detected(labeled).dropna()
    genes = found.mean(axis=1).sort_values(ascending=False, kind="stable").index[:N_GENES]
    encoding = scfm.EncodingConfig(kind="rank", context_length=CONTEXT_LENGTH, duplicates="sum")
    vocabulary = blood_data.make_vocabulary(genes, [*labeled, *others])
    return scfm.pretrain(
        [*labeled, *others], out, encoding=encoding, vocabulary=vocabulary, config=PRETRAINING, progress=False
    )


def finetune(study: str | None, folder: Path) -> scfm.Model:
    """Pretrain, and fine-tune on labeled cells of the other studies; or load the result. The cells are those of seed 0."""
    out = folder / "finetuned" / str(study)
    if out.exists():
        return scfm.load(out)
    model = pretrain(study, folder)
    known = read(blood_data.without(study, labeled=True), folder / "cells", model.encoding, seed=0)
    code_B = codes(known.types_B, known.names)
    training = known.tokens.replace(labels_B=torch.from_numpy(code_B))
    set_labels(model, known.names)
    rows = balanced_rows(code_B, PROBE_CELLS, 0)
    start_from_probe(model.network, model.class_features(training.select(rows)), code_B[rows])
    train_classifier(model, training, FINE_TUNING, progress=False)
    model.network.class_head.set_statistics(torch.from_numpy(model.class_features(training)))
    model.save(out)
    return model


def fit_genes(model: scfm.Model, known: Cells, unlabeled: Cells, limit: float | None = None) -> None:
    """Fit the regression on genes and the novelty score; `model` is changed. Without `limit`, `choose_limit` chooses it."""
    limit = choose_limit(known, unlabeled) if limit is None else limit
    member = fit_regression(known, unlabeled, limit)
    classifier = model.network.gene_classifier
    classifier.scale_V.fill_(MAX_SCALED / limit)
    classifier.set_members([LinearMember(member.weight_VC * limit / MAX_SCALED, member.bias_C)], WEIGHTS)
    fit_novelty(model.network, known, unlabeled)
    model.history["gene_limit"] = limit


@torch.no_grad()
def fit_novelty(network: CellTransformer, known: Cells, unlabeled: Cells) -> None:
    """Fit the Gaussians of the types on components of all cells, with reduced differences between studies.

    The view of single genes is not used: on left-out types it was worse than the components (AUROC .62 and .81).
    """
    everything_BV = sparse.vstack([known.expression_BV, unlabeled.expression_BV], format="csr")
    svd = TruncatedSVD(NOVELTY_COMPONENTS, random_state=0).fit(everything_BV)
    value_BV = known.expression_BV.toarray()
    reduction = Reduction.of(value_BV, known.types_B, known.column("batch"))
    loading_VR = reduction(svd.components_).T.astype(np.float64)
    network.add_novelty(NOVELTY_COMPONENTS)
    genes = np.arange(value_BV.shape[1])
    fit_gaussians(
        network.novelty,
        expression_BV=known.expression_BV,
        labels_B=codes(known.types_B, known.names),
        loading_VR=loading_VR,
        genes=genes,
    )
    network.novelty.weight_V.zero_()
    network.novelty.mean_CV.zero_()


def encoding_config() -> scfm.EncodingConfig:
    return scfm.EncodingConfig(kind="rank", context_length=CONTEXT_LENGTH, duplicates="sum")


@torch.no_grad()
def calibrate(model: scfm.Model, left_out: dict[str, NDArray]) -> None:
    """Set the temperature, and the location, scale and threshold of novelty, from outputs for left-out studies."""
    temperature = fit_temperature(left_out["proba_BC"], left_out["code_B"])
    log_distance_B = left_out["log_distance_B"]
    location, scale = float(log_distance_B.mean()), float(log_distance_B.std())
    model.network.novelty.component_location_C.fill_(location)
    model.network.novelty.component_scale_C.fill_(scale)
    threshold = float(np.quantile((log_distance_B - location) / scale, KEPT_FRACTION))
    model.calibration = Calibration(
        n_cells=len(log_distance_B), ensemble_temperature=temperature, novelty_threshold=threshold
    )
