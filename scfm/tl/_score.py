"""The report of `scfm.fit`: the model beside simple methods, on the same held-out cells."""

# Axes: B cells, V tokens of the vocabulary, C classes.

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
from scipy import sparse

from scfm import baselines
from scfm.data import CellBatch
from scfm.models.model import Model
from scfm.pp._expression import log_normalized_counts
from scfm.tl._split import FitSplit

MOST_CELLS_FOR_BASELINES = 20_000


def score_model(
    model: Model, cells: CellBatch, expression_BV: sparse.csr_matrix, split: FitSplit
) -> list[dict[str, Any]]:
    """Score the model on the test cells, and the transformer's vote alone; rows as `model.report` returns them.

    A row is "inductive" when nothing of it was fitted on test cells, "transductive" when they were seen without their
    labels.
    """
    assert split.labels is not None
    names, codes_B, test = np.asarray(split.labels.names), split.labels.codes[split.test], cells.select(split.test)
    votes = {
        "scfm": model.predict_proba(test, expression_BV[split.test]),
        "scfm, transformer alone": model.predict_proba(test),
    }
    setting = "transductive" if split.transductive else "inductive"
    return [
        {"method": method, "setting": setting, **baselines.score_proba(proba_BC, names, codes_B)}
        for method, proba_BC in votes.items()
    ]


def score_baselines(adata: anndata.AnnData, split: FitSplit, layer: str | None, seed: int) -> list[dict[str, Any]]:
    """Score the baselines on the test cells, fitted on training and calibration cells together: they need none set aside."""
    assert split.labels is not None
    learn = np.union1d(split.train, split.calibration)
    if len(learn) > MOST_CELLS_FOR_BASELINES:
        learn = np.sort(np.random.default_rng(seed).choice(learn, MOST_CELLS_FOR_BASELINES, replace=False))
    table = baselines.score_annotation_baselines(
        log_normalized_counts(adata, layer=layer),
        np.asarray(split.labels.names),
        split.labels.codes,
        learn=learn,
        test=split.test,
        seed=seed,
    )
    return table.reset_index().to_dict("records")
