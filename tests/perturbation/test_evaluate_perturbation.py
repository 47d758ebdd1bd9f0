"""`scfm.tl.evaluate_perturbation`. Oracles: scikit-learn, scipy, simulated cells."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

import scfm
from scfm.errors import LabelsError, VocabularyMismatchError

GENES = [f"G{gene}" for gene in range(40)]
MARKERS = GENES[:6]


@pytest.fixture(scope="module")
def cells():
    """Two groups; the first expresses the markers three times as much, and other genes are as loud."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(2, 2, 40)
    fold = np.where(np.arange(40) < 6, 3.0, 1.0)
    counts = rng.poisson(np.concatenate([np.tile(mean * fold, (60, 1)), np.tile(mean, (60, 1))]))
    adata = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=GENES))
    adata.obs["state"] = ["a"] * 60 + ["b"] * 60
    return adata


@pytest.fixture
def table():
    effect = np.random.default_rng(1).random(40)
    effect[:6] += 0.5
    return pd.DataFrame({"n_cells": 10, "shift_mean": effect}, GENES).sort_values("shift_mean", ascending=False)


def test_markers_are_scored_by_the_area_under_the_curve(table):
    found = scfm.tl.evaluate_perturbation(table, MARKERS)
    assert found.loc["scfm", "auc"] == pytest.approx(roc_auc_score(table.index.isin(MARKERS), table["shift_mean"]))
    assert found.loc["scfm", "n_genes"] == 40
    assert found.loc["scfm", "n_truth"] == 6
    assert found.loc["scfm", "precision"] == table.index[:6].isin(MARKERS).mean()


def test_effects_are_scored_by_rank_correlation(table):
    effects = dict(zip(GENES[:30], np.random.default_rng(2).normal(size=30)))
    found = scfm.tl.evaluate_perturbation(table, effects).loc["scfm"]
    expected = stats.spearmanr(table.loc[GENES[:30], "shift_mean"], list(effects.values())).statistic
    assert found["spearman"] == pytest.approx(expected)
    assert found["n_genes"] == 30


def test_genes_that_hold_a_label_come_first(table):
    by_label = table.rename(columns={"shift_mean": "label_shift_mean"})
    found = scfm.tl.evaluate_perturbation(by_label, MARKERS).loc["scfm", "auc"]
    assert found == pytest.approx(1 - scfm.tl.evaluate_perturbation(table, MARKERS).loc["scfm", "auc"])


def test_simple_methods_stand_in_the_table_and_find_what_they_should(cells, table):
    found = scfm.tl.evaluate_perturbation(table, MARKERS, cells, groupby="state", group="a", n_components=10)
    assert list(found.index) == ["scfm", "expression rank", "differential expression", "linear map on components"]
    assert found.loc["differential expression", "auc"] == 1
    assert found.loc["linear map on components", "auc"] > 0.9
    expression = np.log1p(cells.X.toarray() / cells.X.sum(1).A1[:, None] * 1e4)
    expected = roc_auc_score(np.isin(GENES, MARKERS), expression[:60].mean(0))
    assert found.loc["expression rank", "auc"] == pytest.approx(expected, abs=1e-6)
    assert list(scfm.tl.evaluate_perturbation(table, MARKERS, cells).index) == ["scfm", "expression rank"]


def test_p_values_are_uniform_under_the_null_and_small_for_a_perfect_ranking(table):
    rng = np.random.default_rng(3)
    p_values = [
        scfm.tl.evaluate_perturbation(table, rng.choice(GENES, 8, replace=False).tolist(), n_permutations=200).loc[
            "scfm", "p_value"
        ]
        for _ in range(60)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    perfect = scfm.tl.evaluate_perturbation(table, table.index[:8].tolist(), n_permutations=999).loc["scfm"]
    assert perfect["p_value"] == pytest.approx(0.001)
    assert perfect["null_low"] < 0.5 < perfect["null_high"] < perfect["auc"] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"truth": "G1"}, ValueError, "is the text 'G1'"),
        ({"truth": ["NOT_THERE"]}, VocabularyMismatchError, "0 of the 1 markers"),
        ({"truth": {"G1": 1.0}}, VocabularyMismatchError, "1 genes of the table"),
        ({"truth": MARKERS, "groupby": "state"}, LabelsError, "go together"),
        ({"truth": MARKERS, "groupby": "state", "group": "c"}, LabelsError, "`group` is 'c'"),
    ],
)
def test_bad_arguments_are_named(cells, table, arguments, error, message):
    with pytest.raises(error, match=message):
        scfm.tl.evaluate_perturbation(table, arguments.pop("truth"), cells, **arguments)
    with pytest.raises(ValueError, match="none of the columns"):
        scfm.tl.evaluate_perturbation(table[["n_cells"]], MARKERS)


def test_a_table_of_pairs_of_genes_is_refused(table):
    pairs = table.reset_index(names="gene").assign(affected="G0")
    with pytest.raises(ValueError, match="does not rank genes"):
        scfm.tl.evaluate_perturbation(pairs, MARKERS)
