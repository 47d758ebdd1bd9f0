"""`scfm.tl.evaluate_annotation`: splits, hidden labels, and intervals over seeds."""

import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import scfm
from scfm.data import columns
from scfm.tl import summarize_scores
from scfm.tl._evaluate import hide_labels


def test_a_share_of_labels_is_kept_and_test_cells_do_not_depend_on_it():
    adata = scfm.datasets.pbmc()
    labels = columns.labels(adata.obs, "bulk_labels")
    every = hide_labels(adata, labels, labels_key="bulk_labels", label_fraction=1.0, test_fraction=0.3, seed=0)
    tenth = hide_labels(adata, labels, labels_key="bulk_labels", label_fraction=0.1, test_fraction=0.3, seed=0)
    np.testing.assert_array_equal(every.obs["is_test"], tenth.obs["is_test"])
    is_test = tenth.obs["is_test"].to_numpy()
    assert tenth.obs["bulk_labels"][is_test].notna().all()
    kept = tenth.obs["bulk_labels"][~is_test]
    assert kept.notna().mean() == pytest.approx(0.1, abs=0.02)
    assert kept.nunique() == 10  # no class loses its last cell
    assert adata.obs["bulk_labels"].notna().all()


def test_intervals_are_students():
    scores = [0.7, 0.8, 0.9]
    rows = pd.DataFrame({"method": "a", "setting": "inductive", "seed": [0, 1, 2], "accuracy": scores})
    rows = rows.assign(macro_f1=0.5, balanced_accuracy=0.5, ece=0.1)
    table = summarize_scores(rows)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(scores), scale=stats.sem(scores))
    assert table.loc["a", "accuracy"] == pytest.approx(0.8)
    assert table.loc["a", "accuracy_interval"] == pytest.approx((high - low) / 2)


@pytest.mark.slow
def test_every_seed_is_scored_beside_baselines():
    adata = scfm.datasets.pbmc()[:200].copy()
    rare = adata.obs["bulk_labels"].value_counts()
    adata = adata[adata.obs["bulk_labels"].isin(rare.index[rare >= 10]).to_numpy()].copy()
    config = scfm.FitConfig(n_steps=1, tokens_per_step=1024)
    rows = scfm.tl.evaluate_annotation(adata, labels_key="bulk_labels", seeds=[0, 1], config=config, progress=False)
    assert (rows.groupby("seed")["method"].nunique() == rows["method"].nunique()).all()
    of_ours = rows[rows["method"] == "scfm"].groupby("seed")["setting"].agg(set)
    assert (of_ours == {"inductive", "transductive"}).all()
    assert {"scfm, without pretraining", "scfm, transformer alone, without pretraining"} <= set(rows["method"])
    assert "is_test" not in adata.obs


def test_settings_may_name_what_the_variants_change(monkeypatch):
    calls = []

    def report(adata, **settings):
        calls.append(settings)
        adata.obs["scfm_split"] = "train"
        return pd.DataFrame({"method": ["scfm"], "setting": ["inductive"], "accuracy": [1.0]})

    monkeypatch.setattr(sys.modules["scfm.tl._evaluate"], "_report", report)
    adata, options = scfm.datasets.pbmc(), {"labels_key": "bulk_labels", "seeds": [7]}

    def fits(**settings):
        calls.clear()
        scfm.tl.evaluate_annotation(adata, **options, **settings)
        return [(call.get("transductive"), call.get("pretrain"), call.get("baselines")) for call in calls]

    assert fits() == [(None, None, None), (True, None, False), (None, False, False)]
    assert fits(baselines=True) == [(None, None, True), (True, None, False), (None, False, False)]
    assert fits(baselines=False, variants=False) == [(None, None, False)]
    assert fits(pretrain=False, transductive=True) == [(True, False, None)]  # both variants are what is asked for
    assert all(call["seed"] == 7 for call in calls)
    with pytest.raises(ValueError, match="`seed` is set"):
        fits(seed=1)
