"""Split the cells of a fit into training, calibration and test cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.annotation.probe import balanced_rows
from scfm.data import columns, split_cells
from scfm.data.columns import Labels
from scfm.errors import LabelsError

CALIBRATION_FRACTION = 0.1
MIN_TO_CALIBRATE = 5  # classes with fewer training cells have no calibration cells


@dataclass(frozen=True)
class FitSplit:
    """Row numbers of the cells of each part, ascending. Training, calibration and test cells are disjoint.

    If a class has only one cell, it is a training cell. Classes with fewer than `MIN_TO_CALIBRATE` training cells have no
    calibration cells.

    Attributes
    ----------
    labels
        Class of each cell; None without labels.
    train, calibration, test
        Labeled cells for training, for calibration and for scores.
    fitted
        Cells that are used without their labels, for example in pretraining: training cells and unlabeled cells; all cells
        if `transductive`.
    transductive
        Whether `fitted` contains test and calibration cells.
    """

    labels: Labels | None
    train: NDArray[np.int64]
    calibration: NDArray[np.int64]
    test: NDArray[np.int64]
    fitted: NDArray[np.int64]
    transductive: bool = False

    def limited(self, n_cells: int, seed: int) -> FitSplit:
        """Return a split of at most `n_cells` cells in each part, or this one if it has no more.

        Training cells are chosen so that the numbers of cells per class are as equal as possible; others at random.
        """
        if max(map(len, (self.train, self.calibration, self.test, self.fitted))) <= n_cells:
            return self
        rng = np.random.default_rng(seed)
        calibration, test, fitted = (
            np.sort(rng.choice(rows, n_cells, replace=False)) if len(rows) > n_cells else rows
            for rows in (self.calibration, self.test, self.fitted)
        )
        train = self.train
        if self.labels is not None and len(train) > n_cells:
            train = train[balanced_rows(self.labels.codes[train], n_cells, seed)]
        return replace(self, train=train, calibration=calibration, test=test, fitted=fitted)

    def names(self, n_obs: int) -> pd.Categorical:
        """Return the name of the part of each cell, as written to `obs["scfm_split"]`."""
        parts = {"train": self.train, "calibration": self.calibration, "test": self.test}
        part_B = np.full(n_obs, "unlabeled", dtype=object)
        for name, rows in parts.items():
            part_B[rows] = name
        return pd.Categorical(part_B, categories=[*parts, "unlabeled"])


def split_for_fit(
    obs: Any,
    *,
    labels_key: str | None,
    batch_key: str | None = None,
    test_key: str | None = None,
    test_fraction: float = 0.2,
    transductive: bool = False,
    seed: int = 0,
) -> FitSplit:
    """Choose test cells (those marked by `test_key`, complete batches, or random cells), and calibration cells from the rest.

    Parameters
    ----------
    obs
        `adata.obs`.
    labels_key, batch_key, test_key
        Columns of `obs` with classes, with experimental batches, and with True for test cells; each can be None.
    test_fraction
        Fraction of the labeled cells to hold out if `test_key` is None.
    transductive
        Whether test and calibration cells are used without their labels.
    seed
        Seed of the shuffle.

    Raises
    ------
    LabelsError
        If a column is missing, no cell can be held out, or a class has no training cell.
    """
    every = np.arange(columns.n_rows(obs))
    if labels_key is None:
        return FitSplit(None, every[:0], every[:0], every[:0], every)
    labels = columns.labels(obs, labels_key)
    if test_key is not None:
        is_test_B = columns.truth(obs, test_key)[labels.labeled]
        learn, test = labels.labeled[~is_test_B], labels.labeled[is_test_B]
    else:
        groups_B = None if batch_key is None else _groups(obs, batch_key, labels.labeled)
        parts = split_cells(
            labels=labels.codes[labels.labeled], groups=groups_B, test_fraction=test_fraction, seed=seed
        )
        learn, test = labels.labeled[parts.train], labels.labeled[parts.test]
    if not len(test):
        raise LabelsError(
            f"No cell can be held out to score the model: of {len(labels.names)} classes with {len(labels.labeled)} cells "
            f"{'`test_key` is True for none' if test_key else 'none has two cells'}. Label more cells, or fit without labels."
        )
    learn_labels = np.unique(labels.codes[learn])
    if len(learn_labels) < len(labels.names):
        lost = [name for code, name in enumerate(labels.names) if code not in learn_labels]
        raise LabelsError(
            f"All cells of {', '.join(lost)} are held out because of `{'test_key' if test_key else 'batch_key'}`, so no model "
            "can learn these classes. Choose another `seed` or other test cells, or remove the labels of these cells."
        )
    calibration = _calibration_cells(labels.codes, learn, seed)
    held_out = np.union1d(calibration, test)
    fitted = every if transductive else np.setdiff1d(every, held_out)
    return FitSplit(labels, np.setdiff1d(learn, calibration), calibration, test, fitted, transductive)


def _groups(obs: Any, batch_key: str, labeled: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the batch number of each labeled cell. Each cell without a batch forms a batch of one cell."""
    codes_B = columns.groups(obs, batch_key).codes[labeled]
    missing = np.flatnonzero(codes_B < 0)
    codes_B[missing] = codes_B.max(initial=-1) + 1 + np.arange(len(missing))
    return codes_B


def _calibration_cells(codes_B: NDArray[np.int64], learn: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    counts_C = np.bincount(codes_B[learn])
    many = learn[counts_C[codes_B[learn]] >= MIN_TO_CALIBRATE]
    if not len(many):
        return many
    return many[split_cells(labels=codes_B[many], test_fraction=CALIBRATION_FRACTION, seed=seed).test]
