"""Mapping cells to a labeled reference: neighbors and discriminant analysis in a supervised space, and how well they do."""

# Axes: Q query cells, R reference cells, H held-out reference cells, N neighbors, X features, K directions, C classes, G genes.

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import TruncatedSVD
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from scfm import baselines
from scfm.annotation.adapt import N_SHIFTS
from scfm.annotation.calibration import fit_temperature
from scfm.annotation.discriminant import DiscriminantSpace
from scfm.annotation.harmony import corrected_by_harmony
from scfm.annotation.novelty import consistent_mean, frequent_classes
from scfm.data import split_cells

CALIBRATION_FRACTION = 0.2  # of the reference
MIN_TO_CALIBRATE = 5  # reference cells of a label before one of them calibrates


@dataclass(frozen=True, eq=False)
class Mapping:
    """Labeled cells in their supervised space."""

    space: DiscriminantSpace
    found: NearestNeighbors
    codes_R: NDArray[np.int64]

    @classmethod
    def of(cls, features_RX: NDArray[np.float64], codes_R: NDArray[np.int64], n_neighbors: int) -> Mapping:
        space = DiscriminantSpace.of(features_RX, codes_R)
        found = NearestNeighbors(n_neighbors=min(n_neighbors, len(codes_R))).fit(space.coordinates(features_RX))
        return cls(space, found, codes_R)

    def common_shift(self, coordinate_QK: NDArray[np.float64]) -> NDArray[np.float64]:
        """What all classes have in common in the difference between query and reference, shape (K,).

        It is `consistent_mean` of the differences of mean coordinates. The classes of the query are those of the discriminant
        analysis, which are computed again without the shift, three times in all; 0 if fewer than two classes have enough cells.
        """
        shift_K: NDArray[np.float64] = np.zeros(coordinate_QK.shape[1])
        for _ in range(N_SHIFTS):
            class_Q = self.space.log_proba(coordinate_QK - shift_K).argmax(1)
            classes = frequent_classes(class_Q)
            if len(classes) < 2:
                return np.zeros_like(shift_K)
            found_CK = np.stack([coordinate_QK[class_Q == label].mean(0) for label in classes])
            shift_K = consistent_mean(found_CK - self.space.center_CK[classes])
        return shift_K

    def predict(
        self, coordinate_QK: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Log-probabilities (Q, C), and distances and rows of the neighbors (Q, N)."""
        distance_QN, row_QN = self.found.kneighbors(coordinate_QK)
        counts_C = np.bincount(self.codes_R)
        share_QC = shares(distance_QN, self.codes_R[row_QN], 1 / np.sqrt(counts_C))
        proba_QC = (share_QC + np.exp(self.space.log_proba(coordinate_QK))) / 2
        return np.log(np.maximum(proba_QC, 1e-9)), distance_QN, row_QN


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A part of the reference that was mapped to the rest.

    Attributes
    ----------
    held, rest
        Rows of both parts.
    log_proba_HC
        Log-probability of each class for each held-out cell, shape (H, C).
    temperature
        The temperature that suits them.
    """

    held: NDArray[np.int64]
    rest: NDArray[np.int64]
    log_proba_HC: NDArray[np.float64]
    temperature: float

    @classmethod
    def of(cls, features_RX: NDArray[np.float64], codes_R: NDArray[np.int64], n_neighbors: int) -> HeldOut | None:
        """Map a fifth of the reference to the rest; None if the reference is too small."""
        often = np.flatnonzero(np.bincount(codes_R)[codes_R] >= MIN_TO_CALIBRATE)
        if len(often) < MIN_TO_CALIBRATE / CALIBRATION_FRACTION:
            return None
        held = often[split_cells(labels=codes_R[often], test_fraction=CALIBRATION_FRACTION).test]
        rest = np.setdiff1d(np.arange(len(codes_R)), held)
        mapping = Mapping.of(features_RX[rest], codes_R[rest], n_neighbors)
        log_proba_HC = mapping.predict(mapping.space.coordinates(features_RX[held]))[0]
        return cls(held, rest, log_proba_HC, fit_temperature(np.exp(log_proba_HC), codes_R[held]))

    def report(
        self, expression_RG: sparse.csr_matrix, names: tuple[str, ...], codes_R: NDArray[np.int64], n_neighbors: int
    ) -> pd.DataFrame:
        """Score the mapping of the held-out cells beside simple methods that learned from the rest.

        Parameters
        ----------
        expression_RG
            log1p of counts per 10,000 of the reference.
        names, codes_R
            Class names, and the class of each reference cell.
        n_neighbors
            Of the row "Harmony + nearest neighbors", which needs harmonypy: neighbors on 50 principal components that were
            corrected for the difference between the held-out cells and the rest.

        Returns
        -------
        The columns of `scfm.baselines.score_annotation_baselines`.
        """
        text = np.asarray(names)
        proba_HC = softmax(self.log_proba_HC / self.temperature, axis=1)
        own = {"setting": "inductive", **baselines.score_proba(proba_HC, text, codes_R[self.held])}
        rows: dict[str, dict[str, Any]] = {"scfm.tl.map_reference": own}
        others = baselines.score_annotation_baselines(expression_RG, text, codes_R, learn=self.rest, test=self.held)
        rows |= others.to_dict(orient="index")
        if find_spec("harmonypy") is not None:
            after_HC = self._after_harmony(expression_RG, codes_R, n_neighbors)
            scored = baselines.score_proba(after_HC, text, codes_R[self.held])
            rows[f"Harmony + {n_neighbors} nearest neighbors"] = {"setting": "transductive", **scored}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")

    def _after_harmony(
        self, expression_RG: sparse.csr_matrix, codes_R: NDArray[np.int64], n_neighbors: int
    ) -> NDArray[np.float64]:
        n_components = max(1, min(50, *(size - 1 for size in expression_RG.shape)))
        component_RK = TruncatedSVD(n_components, random_state=0).fit_transform(expression_RG)
        part_R = np.where(np.isin(np.arange(len(codes_R)), self.held), "held out", "rest")
        corrected_RK = corrected_by_harmony(component_RK, {"part": part_R}, seed=0)
        neighbors = KNeighborsClassifier(min(n_neighbors, len(self.rest))).fit(
            corrected_RK[self.rest], codes_R[self.rest]
        )
        proba_HC = np.zeros((len(self.held), int(codes_R.max()) + 1))
        proba_HC[:, neighbors.classes_] = neighbors.predict_proba(corrected_RK[self.held])
        return proba_HC


def shares(
    distance_QN: NDArray[np.floating], code_QN: NDArray[np.int64], weight_C: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weighted share of each class among the neighbors, shape (Q, C)."""
    width_Q1 = np.maximum(np.median(distance_QN, axis=1, keepdims=True), 1e-12)
    weight_QN = np.exp(-0.5 * (distance_QN / width_Q1) ** 2) * weight_C[code_QN]
    share_QC = np.zeros((len(code_QN), len(weight_C)))
    np.add.at(share_QC, (np.arange(len(code_QN))[:, None], code_QN), weight_QN)
    return share_QC / share_QC.sum(1, keepdims=True)


def hub_fraction(row_QN: NDArray[np.int64], n_reference: int) -> float:
    """Fraction of all neighbors that are among the 5 % of reference cells that are chosen most often."""
    return hub_fraction_of(np.bincount(row_QN.ravel()), n_reference)


def hub_fraction_of(n_chosen_R: NDArray[np.integer], n_reference: int) -> float:
    """Return `hub_fraction` from the number of times that each reference cell is a neighbor."""
    chosen_R = np.sort(n_chosen_R)[::-1]
    return float(chosen_R[: max(1, n_reference // 20)].sum() / n_chosen_R.sum())
