"""Which cells train, calibrate and test."""

import numpy as np
import pandas as pd
import pytest

from scfm.annotation.splits import split_for_fit
from scfm.errors import LabelsError


def test_parts_are_disjoint_and_small_classes_follow_the_rule():
    labels = ["many"] * 100 + ["few"] * 4 + ["one"] + [None] * 7
    split = split_for_fit(pd.DataFrame({"type": labels}), labels_key="type")
    parts = np.concatenate([split.train, split.calibration, split.test])
    assert sorted(parts) == list(range(105))
    assert sorted(np.concatenate([split.fitted, split.calibration, split.test])) == list(range(112))
    assert set(split.calibration) <= set(range(100))  # too few of "few" and "one" remain
    assert 104 in split.train


def test_held_out_cells_are_learned_from_only_where_the_fit_says_transductive():
    obs = pd.DataFrame({"type": ["a", "b", None] * 40})
    inductive, transductive = (split_for_fit(obs, labels_key="type", transductive=flag) for flag in (False, True))
    for part in ("train", "calibration", "test"):
        np.testing.assert_array_equal(getattr(transductive, part), getattr(inductive, part))
    assert not set(inductive.fitted) & set(np.concatenate([inductive.test, inductive.calibration]))
    np.testing.assert_array_equal(transductive.fitted, np.arange(120))


def test_batches_are_held_out_whole():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"type": rng.choice(["a", "b"], 200), "donor": rng.choice(list("uvwxy"), 200)})
    split = split_for_fit(obs, labels_key="type", batch_key="donor")
    held = set(obs["donor"].iloc[split.test])
    assert held
    assert not held & set(obs["donor"].iloc[np.concatenate([split.train, split.calibration])])


def test_a_class_that_lives_in_held_out_batches_alone_is_an_error():
    obs = pd.DataFrame({"type": ["a"] * 20 + ["b"] * 20 + ["c"] * 20, "donor": ["x"] * 20 + ["y"] * 20 + ["z"] * 20})
    with pytest.raises(LabelsError, match="so no model can learn"):
        split_for_fit(obs, labels_key="type", batch_key="donor", test_fraction=0.3)


def test_named_test_cells_are_the_ones_held_out():
    obs = pd.DataFrame({"bulk_labels": ["a", "b"] * 60, "mine": np.arange(120) % 5 == 0})
    split = split_for_fit(obs, labels_key="bulk_labels", test_key="mine")
    np.testing.assert_array_equal(split.test, np.flatnonzero(obs["mine"]))
    assert not set(split.test) & set(np.concatenate([split.train, split.calibration, split.fitted]))
