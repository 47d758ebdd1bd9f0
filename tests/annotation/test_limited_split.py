import numpy as np
import pytest

from scfm.annotation.splits import split_for_fit


@pytest.fixture
def split():
    import pandas as pd

    labels = np.repeat(["A", "B", "C", None], [600, 300, 20, 500])
    return split_for_fit(pd.DataFrame({"label": labels}), labels_key="label")


def test_a_split_that_is_small_enough_stays(split):
    assert split.limited(10_000, 0) is split


def test_parts_are_subsets_and_rare_classes_keep_their_cells(split):
    few = split.limited(60, 0)
    for name in ("train", "calibration", "test", "fitted"):
        part, whole = getattr(few, name), getattr(split, name)
        assert len(part) == min(60, len(whole))
        assert np.isin(part, whole).all()
        assert (np.diff(part) > 0).all()
    codes = split.labels.codes
    rare = split.train[codes[split.train] == 2]
    assert np.isin(rare, few.train).all()
    counts = np.bincount(codes[few.train])
    assert counts[0] == pytest.approx(counts[1], abs=1)
