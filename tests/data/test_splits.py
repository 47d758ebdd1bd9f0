import numpy as np
import pytest

from scfm.data import split_cells


def test_every_class_keeps_its_share():
    labels = np.repeat(["a", "b", "c", "d"], [100, 50, 2, 1])
    split = split_cells(labels=labels, test_fraction=0.2, seed=3)
    assert sorted([*split.train, *split.test]) == list(range(153))
    names, held = np.unique(labels[split.test], return_counts=True)
    assert dict(zip(names, held)) == {"a": 20, "b": 10, "c": 1}
    assert (np.diff(split.train) > 0).all()


def test_seed_decides():
    one, same, other = (split_cells(50, seed=seed) for seed in (0, 0, 1))
    assert one.test.tolist() == same.test.tolist()
    assert one.test.tolist() != other.test.tolist()
    assert len(one.test) == 10


def test_missing_labels_are_a_class_of_their_own():
    labels = np.array(["a"] * 20 + [None] * 10, dtype=object)
    split = split_cells(labels=labels, test_fraction=0.5)
    assert np.count_nonzero(split.test >= 20) == 5


def test_groups_stay_together():
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 10, 500), rng.integers(0, 4, 500)
    split = split_cells(labels=labels, groups=groups, test_fraction=0.3, seed=1)
    assert not set(groups[split.train]) & set(groups[split.test])
    assert sorted([*split.train, *split.test]) == list(range(500))
    assert 0.2 < len(split.test) / 500 < 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_obs": 5, "test_fraction": 1.0}, "between 0 and 1"),
        ({}, "number of cells"),
        ({"labels": ["a"] * 5, "groups": [1] * 4}, r"\[4, 5\]"),
        ({"groups": [1, 1, 1]}, "only one group"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_cells(**arguments)
