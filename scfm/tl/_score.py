"""The report of `scfm.fit`: the model beside simple methods, on the same held-out cells."""

# Axes: B cells, V tokens of the vocabulary, E inputs of the class head, C classes.

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm import baselines
from scfm.models.model import Model
from scfm.pp._expression import log_normalized_counts
from scfm.tl._calibrate import class_logits
from scfm.tl._split import FitSplit

MOST_CELLS_FOR_BASELINES = 20_000


def score_model(
    model: Model, features_BE: NDArray[np.float32], expression_BV: sparse.csr_matrix, split: FitSplit
) -> list[dict[str, Any]]:
    """Score the model on the test cells, and the transformer's vote alone; rows as `model.report` returns them.

    `features_BE` is what the class head reads of all cells, and `expression_BV` what the gene classifier reads.
    A row is "inductive" when nothing of it was fitted on test cells, "transductive" when they were seen without their
    labels.
    """
    assert split.labels is not None
    names, codes_B = np.asarray(split.labels.names), split.labels.codes[split.test]
    logits_BC = class_logits(model, features_BE[split.test])
    votes = {
        "scfm": model.proba_of_logits(logits_BC, expression_BV[split.test]),
        "scfm, transformer alone": model.proba_of_logits(logits_BC),
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
