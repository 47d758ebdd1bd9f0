"""Which cells train, which calibrate, which test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm.data import split_cells
from scfm.data.labels import Labels
from scfm.errors import LabelsError

CALIBRATION_FRACTION = 0.1
FEWEST_TO_CALIBRATE = 5  # training cells that a class must have before one of them is set aside


@dataclass(frozen=True)
class FitSplit:
    """Rows by the part they play: ascending, the first three disjoint.

    `fitted` is what is learned from without labels: training and unlabelled cells, with `transductive` all cells.

    A class of one labelled cell is trained on and never tested; one of fewer than `FEWEST_TO_CALIBRATE` training cells
    has no calibration cell.
    """

    labels: Labels | None
    train: NDArray[np.int64]
    calibration: NDArray[np.int64]
    test: NDArray[np.int64]
    fitted: NDArray[np.int64]
    transductive: bool = False

    def names(self, n_obs: int) -> pd.Categorical:
        """Part of each cell, as `obs["scfm_split"]` holds it."""
        parts = {"train": self.train, "calibration": self.calibration, "test": self.test}
        part_B = np.full(n_obs, "unlabelled", dtype=object)
        for name, rows in parts.items():
            part_B[rows] = name
        return pd.Categorical(part_B, categories=[*parts, "unlabelled"])


def split_for_fit(
    obs: pd.DataFrame,
    labels_key: str | None,
    batch_key: str | None,
    test_fraction: float,
    seed: int,
    *,
    test_key: str | None = None,
    transductive: bool = False,
) -> FitSplit:
    """Hold out test cells (those of `test_key`, or whole batches with `batch_key`), and calibration cells from the rest."""
    every = np.arange(len(obs))
    if labels_key is None:
        return FitSplit(None, every[:0], every[:0], every[:0], every)
    labels = Labels.from_obs(obs, labels_key)
    if test_key is not None:
        is_test_B = _column(obs, "test_key", test_key).to_numpy(dtype=bool)[labels.labelled]
        learn, test = labels.labelled[~is_test_B], labels.labelled[is_test_B]
    else:
        groups_B = (
            None if batch_key is None else _column(obs, "batch_key", batch_key).astype(str).to_numpy()[labels.labelled]
        )
        parts = split_cells(
            labels=labels.codes[labels.labelled], groups=groups_B, test_fraction=test_fraction, seed=seed
        )
        learn, test = labels.labelled[parts.train], labels.labelled[parts.test]
    if not len(test):
        raise LabelsError(
            f"No cell can be held out to score the model: of {len(labels.names)} classes with {len(labels.labelled)} cells "
            f"{'`test_key` names none' if test_key else 'none has two'}. Give more labelled cells, or fit without labels."
        )
    learn_labels = np.unique(labels.codes[learn])
    if len(learn_labels) < len(labels.names):
        lost = [name for code, name in enumerate(labels.names) if code not in learn_labels]
        raise LabelsError(
            f"Every cell of {', '.join(lost)} is held out by `{'test_key' if test_key else 'batch_key'}`, so no model can "
            "learn of them. Choose another `seed` or other cells, or take these cells' labels away."
        )
    calibration = _set_aside(labels.codes, learn, seed)
    held_out = np.union1d(calibration, test)
    fitted = every if transductive else np.setdiff1d(every, held_out)
    return FitSplit(labels, np.setdiff1d(learn, calibration), calibration, test, fitted, transductive)


def _column(obs: pd.DataFrame, argument: str, key: str) -> pd.Series:
    if key not in obs:
        raise LabelsError(f"`{argument}` is {key!r}, which is not in `adata.obs` ({', '.join(map(str, obs))}).")
    return obs[key]


def _set_aside(codes_B: NDArray[np.int64], learn: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    counts_C = np.bincount(codes_B[learn])
    many = learn[counts_C[codes_B[learn]] >= FEWEST_TO_CALIBRATE]
    if not len(many):
        return many
    return many[split_cells(labels=codes_B[many], test_fraction=CALIBRATION_FRACTION, seed=seed).test]
