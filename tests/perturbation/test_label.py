"""`measure="label"` and `center=True`. Oracles: probabilities of edited cells one at a time, cosines by hand."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from scipy.stats import spearmanr

import scfm
from scfm.errors import LabelsError, ModelTaskError
from scfm.perturbation.edits import Editor
from scfm.perturbation.labels import LabelHead
from scfm.perturbation.screening.estimate import Estimator

FAST = {"n_bootstrap": 0, "min_cells": 1, "progress": False}


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()


@pytest.fixture(scope="module", params=["rank", "bin"])
def model(request, adata):
    config = scfm.FitConfig(n_steps=20, tokens_per_step=2048)
    return scfm.fit(
        adata.copy(), labels_key="bulk_labels", encoding=request.param, config=config, baselines=False, progress=False
    )


def log_odds(model, cell, expression_1V, label):
    """Mean of log(p / p') over the other labels, from what `annotate` predicts."""
    log_proba_C = np.log(model.predict_proba(cell, expression_1V)[0].astype(np.float64))
    return log_proba_C[label] - np.delete(log_proba_C, label).mean()


def test_label_shifts_are_those_of_edited_cells(adata, model):
    some, genes = adata[:3], ["CD74", "CST3", "LYZ", "NKG7"]
    table = scfm.tl.perturb(some, model, genes=genes, measure="label", groupby="bulk_labels", **FAST)
    cells, expected = scfm.pp.encode(some, model), {gene: [] for gene in genes}
    expression_BV = scfm.pp.log_expression(some, model)
    for number, label in enumerate(some.obs["bulk_labels"]):
        code, cell, before_1V = model.labels.index(label), cells.select([number]), expression_BV[[number]]
        for gene, token in zip(genes, model.encoding.vocabulary.require(genes)):
            keep = cell.gene_ids_T != token
            if keep.all():
                continue
            edited = scfm.CellBatch(
                gene_ids_T=cell.gene_ids_T[keep],
                cu_seqlens=torch.tensor([0, int(keep.sum())], dtype=torch.int32),
                values_T=None if cell.values_T is None else cell.values_T[keep],
            )
            after_1V = before_1V.copy()
            after_1V.data[after_1V.indices == token] = 0
            shift = log_odds(model, edited, after_1V, code) - log_odds(model, cell, before_1V, code)
            expected[gene].append(shift)
    for gene, shifts in expected.items():
        if shifts:
            assert table.loc[gene, "label_shift_mean"] == pytest.approx(np.mean(shifts), rel=1e-3, abs=5e-5)
    assert table["label_shift_mean"].dropna().is_monotonic_increasing


def test_expression_changes_as_values_do(adata, model):
    some = adata[:2]
    expression_BV, genes = scfm.pp.log_expression(some, model), ["CST3", "CD74"]
    head, tokens = LabelHead(model, expression_BV), model.encoding.vocabulary.require(["CST3", "CD74"])
    classifier, values_V = model.network.gene_classifier, expression_BV[[1]].toarray()[0].astype(np.float64)
    expressed = np.sort(values_V[values_V > 0])
    assert (values_V[tokens] > 0).all(), genes

    def log_odds_of(values_V):
        logits_C = classifier.logits(csr_matrix(values_V.astype(np.float32)))[0].astype(np.float64)
        log_proba_C = (
            log_softmax(logits_C) * classifier.ensemble_weights[1].item() / model.calibration.ensemble_temperature
        )
        return log_proba_C[3] - np.delete(log_proba_C, 3).mean()

    def moved(token, step):
        rank = (np.searchsorted(expressed, values_V[token]) + np.searchsorted(expressed, values_V[token], "right")) / 2
        quantile = np.clip(rank / len(expressed) + step, 0, 1)
        return np.quantile(expressed, quantile, method="nearest")

    changed = {"delete": lambda token: 0.0, "overexpress": lambda token: expressed[-1]}
    changed |= {"inhibit": lambda token: moved(token, -0.25), "activate": lambda token: moved(token, 0.25)}
    for kind, value in changed.items():
        edited_V = values_V.copy()
        edited_V[tokens] = [value(token) for token in tokens]
        effect = head.expression.edit_effect(1, 3, tokens, Editor.of(model.encoding, kind))
        assert effect == pytest.approx(log_odds_of(edited_V) - log_odds_of(values_V), rel=1e-3, abs=1e-5), kind


def test_without_a_column_the_label_of_annotate_is_measured(adata, model):
    some = adata[:4].copy()
    scfm.tl.annotate(some, model, progress=False)
    first = scfm.tl.perturb(some, model, genes=["CD74", "LYZ"], measure="label", **FAST)
    second = scfm.tl.perturb(some, model, genes=["CD74", "LYZ"], measure="label", groupby="scfm_label", **FAST)
    pd.testing.assert_frame_equal(first, second)


def test_the_screen_by_labels_ranks_as_exact_deletion_does(adata, model):
    some = adata[adata.obs["bulk_labels"] == "CD19+ B"][:2]
    options = {"measure": "label", "groupby": "bulk_labels", "positions": "held", **FAST}
    exact = scfm.tl.perturb(some, model, **options)
    table = scfm.tl.screen(some, model, n_verify=10, n_check=5, **options)
    joined = table.loc[exact.index]
    assert spearmanr(joined["estimate_mean"], exact["label_shift_mean"]).statistic > 0.9
    verified = table.index[table["exact"]]
    assert len(verified) == 15
    again = scfm.tl.perturb(some, model, genes=list(verified), **options)["label_shift_mean"]
    pd.testing.assert_series_equal(table.loc[verified, "label_shift_mean"], again[verified], rtol=1e-9)
    best = exact.index[:5]
    assert table.loc[best, "exact"].mean() >= 0.8


def test_the_gradient_of_the_log_odds_is_that_of_finite_differences(adata, model):
    cells = scfm.pp.encode(adata[:3], model)
    estimator = Estimator(model.network, cells, readout=model.network.class_readout)
    head, label_B = LabelHead(model), torch.tensor([0, 1, 2])
    directions = []
    estimator.change_along = directions.append
    estimator.label_shift(head, label_B)
    step = (
        torch.randn(3, directions[0].shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-6
    )
    before, after = (head.log_odds(estimator.mean_BD.double() + sign * step, label_B) for sign in (-1, 1))
    torch.testing.assert_close((directions[0] * step).sum(1), (after - before).detach() / 2, rtol=1e-5, atol=1e-12)


def test_centered_shifts_are_cosines_of_what_differs_between_cells(adata, model):
    some, gene = adata[:5], "CD74"
    goal = adata[adata.obs["bulk_labels"] == "CD19+ B"][:4]
    both = anndata.concat([some, goal], index_unique="-")
    both.obs["state"] = ["a"] * 5 + ["b"] * 4
    table = scfm.tl.perturb(
        both, model, genes=[gene], null_genes=["LYZ"], groupby="state", start="a", goal="b", center=True, **FAST
    )
    cells, token = scfm.pp.encode(both, model), int(model.encoding.vocabulary.require([gene])[0])
    before = model.embed(cells).astype(float)
    center = before.mean(0)
    toward = before[5:].mean(0) - center
    shifts, goal_shifts = [], []
    for number in range(5):
        cell = cells.select([number])
        keep = cell.gene_ids_T != token
        if keep.all():
            continue
        edited = scfm.CellBatch(
            gene_ids_T=cell.gene_ids_T[keep],
            cu_seqlens=torch.tensor([0, int(keep.sum())], dtype=torch.int32),
            values_T=None if cell.values_T is None else cell.values_T[keep],
        )
        a, b = before[number] - center, model.embed(edited)[0] - center
        cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
        shifts.append(1 - cosine(a, b))
        goal_shifts.append(cosine(b, toward) - cosine(a, toward))
    assert table.loc[gene, "shift_mean"] == pytest.approx(np.mean(shifts), rel=1e-3, abs=1e-7)
    assert table.loc[gene, "goal_shift_mean"] == pytest.approx(np.mean(goal_shifts), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "distance"}, "choose one of shift, goal, label"),
        ({"measure": "goal"}, "name the `goal`"),
        ({"measure": "label", "groupby": "bulk_labels", "goal": "CD19+ B"}, "leave `goal` out"),
        ({"measure": "label", "center": True}, "leave `center` out"),
        ({"measure": "label", "groupby": "louvain"}, "are not labels of the model"),
    ],
)
def test_measures_that_do_not_fit_are_refused(adata, model, arguments, message):
    with pytest.raises((ValueError, LabelsError), match=message):
        scfm.tl.screen(adata[:2], model, progress=False, **arguments)


def test_a_model_without_labels_cannot_measure_them(adata):
    model = scfm.fit(adata[:60].copy(), config=scfm.FitConfig(n_steps=1), progress=False)
    with pytest.raises(ModelTaskError, match="not trained to annotate"):
        scfm.tl.perturb(adata[:2], model, genes=["CD74"], measure="label", progress=False)
