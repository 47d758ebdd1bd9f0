"""Rows of the report of `scfm.fit`: scores of the model and of simple methods on the same test cells."""

# Axes: B cells, V tokens of the vocabulary, X inputs of the class head, C classes.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm import baselines
from scfm.annotation.probe import probe_probabilities
from scfm.annotation.splits import FitSplit
from scfm.models.model import Model

MAX_CELLS_FOR_BASELINES = 20_000

Row = dict[str, Any]


def score_model(model: Model, logits_BC: torch.Tensor, test_BV: sparse.csr_matrix, split: FitSplit) -> list[Row]:
    """Return rows of `model.report` with the scores of the model and of the transformer alone on the test cells.

    A row is "inductive" if nothing was fitted on test cells, and "transductive" if they were used without their labels.

    Parameters
    ----------
    model
        The calibrated model.
    logits_BC
        Logits of the transformer for all cells.
    test_BV
        log1p of counts per 10,000 of the test cells by token id.
    split
        The test cells.
    """
    test = split.test
    return [
        score_row("scfm", model.proba_of_logits(logits_BC[test], test_BV), split),
        score_row("scfm, transformer alone", model.proba_of_logits(logits_BC[test]), split),
    ]


def score_row(method: str, proba_BC: NDArray[np.floating], split: FitSplit) -> Row:
    """Return the report row for class probabilities of the test cells, shape (test cells, C)."""
    assert split.labels is not None
    names, codes_B = np.asarray(split.labels.names), split.labels.codes[split.test]
    setting = "transductive" if split.transductive else "inductive"
    return {"method": method, "setting": setting, **baselines.score_proba(proba_BC, names, codes_B)}


def score_probe(features_BX: NDArray[np.float32], split: FitSplit, *, seed: int) -> Row:
    """Return the row for a linear probe on the embedding of the model before fine-tuning."""
    assert split.labels is not None
    learn = cells_to_learn(split, seed)
    proba_BC = probe_probabilities(
        features_BX[learn], split.labels.codes[learn], features_BX[split.test], len(split.labels.names)
    )
    return score_row("linear probe on the frozen embedding", proba_BC, split)


def score_baselines(
    expression: Callable[[NDArray[np.int64]], sparse.csr_matrix], split: FitSplit, *, n_obs: int, seed: int
) -> list[Row]:
    """Return the rows of the baselines. They are not calibrated, so they are fitted on calibration cells too.

    `expression` returns log1p of counts per 10,000 by gene of the rows that it is given. All rows are read if there are at
    most `MAX_CELLS_FOR_BASELINES`, else those of the cells to learn from and of the test cells.
    """
    assert split.labels is not None
    learn = cells_to_learn(split, seed)
    rows = np.arange(n_obs) if n_obs <= MAX_CELLS_FOR_BASELINES else np.union1d(learn, split.test)
    table = baselines.score_annotation_baselines(
        expression(rows),
        np.asarray(split.labels.names),
        split.labels.codes[rows],
        learn=np.searchsorted(rows, learn),
        test=np.searchsorted(rows, split.test),
        seed=seed,
    )
    return table.reset_index().to_dict("records")


def cells_to_learn(split: FitSplit, seed: int) -> NDArray[np.int64]:
    """Return the rows of at most `MAX_CELLS_FOR_BASELINES` training and calibration cells, ascending."""
    learn = np.union1d(split.train, split.calibration)
    if len(learn) > MAX_CELLS_FOR_BASELINES:
        learn = np.sort(np.random.default_rng(seed).choice(learn, MAX_CELLS_FOR_BASELINES, replace=False))
    return learn
