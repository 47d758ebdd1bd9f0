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


def score_annotation(
    model: Model,
    adata: anndata.AnnData,
    cells: CellBatch,
    expression_BV: sparse.csr_matrix,
    split: FitSplit,
    layer: str | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Score the model and the baselines on the test cells, rows as `model.report` returns them.

    Baselines are fitted on training and calibration cells together: they need none set aside. A row is "inductive" when
    nothing of it was fitted on test cells, "transductive" when they were seen without their labels.
    """
    assert split.labels is not None
    names, codes, test = np.asarray(split.labels.names), split.labels.codes, split.test
    votes = {
        "scfm": model.predict_proba(cells.select(test), expression_BV[test]),
        "scfm, transformer alone": model.predict_proba(cells.select(test)),
    }
    rows: list[dict[str, Any]] = []
    for method, proba_BC in votes.items():
        scored = baselines.scores(list(names[codes[test]]), list(names[proba_BC.argmax(1)]))
        error = baselines.expected_calibration_error(proba_BC.max(1), proba_BC.argmax(1) == codes[test])
        rows.append({"method": method, "setting": "inductive", **scored, "ece": error})
    learn = np.union1d(split.train, split.calibration)
    if len(learn) > MOST_CELLS_FOR_BASELINES:
        learn = np.sort(np.random.default_rng(seed).choice(learn, MOST_CELLS_FOR_BASELINES, replace=False))
    table = baselines.score_annotation_baselines(
        log_normalized_counts(adata, layer=layer), names, codes, learn=learn, test=test, seed=seed
    )
    return rows + table.reset_index().to_dict("records")
