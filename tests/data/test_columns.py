"""One reader for user columns: what is missing is missing, and what is of another type is refused."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from scfm.data import columns
from scfm.errors import CountsError, LabelsError, VocabularyMismatchError


def obs(values, dtype=None, name="c"):
    series = pd.Series(values, dtype=dtype)
    return pd.DataFrame({name: series.to_numpy() if dtype is None else series.array})


MISSING = {
    "object with NaN": (["a", np.nan, "b", None, "a", ""], object),
    "object with NA": (["a", pd.NA, "b", pd.NA, "a", pd.NA], object),
    "string": (["a", None, "b", None, "a", ""], "string"),
    "category": (["a", None, "b", None, "a", None], "category"),
    "category with an empty one": (["a", "", "b", "", "a", ""], "category"),
}


@pytest.mark.parametrize("form", MISSING)
@pytest.mark.parametrize("read", [columns.labels, columns.groups])
def test_missing_values_are_no_class_and_no_group(form, read):
    found = read(obs(*MISSING[form]), "c")
    assert found.names == ("a", "b")
    assert found.codes.tolist() == [0, -1, 1, -1, 0, -1]
    assert found.codes.dtype == np.int64
    assert found.labeled.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("values", "dtype", "names"),
    [
        ([2, 1, 2, 1], "int64", ("1", "2")),
        ([2, 1, None, 1], "Int64", ("1", "2")),
        ([2.0, 1.0, np.nan, 1.0], "float64", ("1.0", "2.0")),
        ([True, False, True, False], "bool", ("False", "True")),
    ],
)
def test_numbers_may_name_groups(values, dtype, names):
    assert columns.groups(obs(values, dtype), "c").names == names


def test_only_classes_that_occur_are_classes():
    column = pd.Categorical(["a", "b", "a"], categories=["z", "b", "a"])
    assert columns.labels(obs(column), "c").names == ("a", "b")


def test_a_measurement_and_a_single_class_are_no_labels():
    with pytest.raises(LabelsError, match="150 different numbers"):
        columns.labels(obs(np.arange(150) / 7), "c")
    with pytest.raises(LabelsError, match=r"holds 1 class \(a\)"):
        columns.labels(obs(["a", np.nan], object), "c")
    with pytest.raises(LabelsError, match="no value for any cell"):
        columns.groups(obs([np.nan, None], object), "c")


@pytest.mark.parametrize("dtype", ["bool", "boolean", "object", "category"])
def test_truth_values_of_every_boolean_type(dtype):
    found = columns.truth(obs([True, False, True], dtype), "c")
    assert found.dtype == bool
    assert found.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "values", [["True", "False"], [0, 1], [1.0, 0.0], [np.nan, 1.0], pd.to_datetime(["2020-01-01", "2020-01-02"])]
)
def test_what_is_not_true_or_false_is_no_truth_value(values):
    with pytest.raises(LabelsError, match="it must hold True and False"):
        columns.truth(obs(values), "c")


@pytest.mark.parametrize("dtype", ["boolean", "object"])
def test_a_missing_truth_value_is_not_true_and_the_advice_works(dtype):
    frame = obs([True, None, False], dtype)
    with pytest.raises(LabelsError, match=r"1 of 3 cells have no value.*astype\('boolean'\).fillna\(False\)"):
        columns.truth(frame, "c")
    frame["c"] = frame["c"].astype("boolean").fillna(False)
    assert columns.truth(frame, "c").tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("values", "true"),
    [(["train", "test"], "'test'"), (["False", "True"], "'True'"), ([0, 1, 0], "1"), ([4, 0, 2], "4")],
)
def test_the_advice_for_other_values_works(values, true):
    frame = obs(values)
    with pytest.raises(LabelsError) as raised:
        columns.truth(frame, "c")
    advice = f"adata.obs[\"is_test\"] = adata.obs['c'] == {true}"
    assert f"`{advice}`" in str(raised.value)
    exec(advice, {"adata": SimpleNamespace(obs=frame)})
    assert columns.truth(frame, "is_test").tolist() == [repr(value) == true for value in values]


@pytest.mark.parametrize("dtype", ["int64", "float32", "Int64", "uint8", "object"])
def test_totals_of_every_numeric_type(dtype):
    found = columns.totals(obs([3, 0, 7], dtype), "c")
    assert found.dtype == np.float64
    assert found.tolist() == [3, 0, 7]


@pytest.mark.parametrize(
    "values", [pd.to_datetime(["2020-01-01", "2020-01-02"]), ["3", "7"], [True, False], pd.to_timedelta([1, 2])]
)
def test_dates_texts_and_booleans_are_no_totals(values):
    with pytest.raises(CountsError, match="must hold each cell's total counts"):
        columns.totals(obs(values), "c")


def test_a_missing_total_stays_missing():
    assert np.isnan(columns.totals(obs([3, None], "Int64"), "c")[1])


def test_gene_names_that_are_missing_are_none():
    frame = obs(["A", np.nan, None, pd.NA, "", "nan"], object)  # nan is a gene of the fly
    assert columns.gene_names(frame, "c") == ["A", None, None, None, None, "nan"]


def test_columns_named_by_numbers_are_found_and_do_not_disturb():
    frame = pd.DataFrame({0: ["a", "b"], "donor": ["x", "y"]})
    assert columns.groups(frame, "0").names == ("a", "b")
    with pytest.raises(LabelsError, match=r"`batch_key` is 'donr', which is not a column .* Did you mean 'donor'\?"):
        columns.groups(frame, "donr")


def test_two_columns_of_one_name_are_refused_only_where_they_are_asked_for():
    frame = pd.DataFrame([["a", "b", "c"], ["d", "e", "f"]], columns=["one", "two", "two"])
    assert columns.groups(frame, "one").names == ("a", "d")
    with pytest.raises(LabelsError, match="has 2 columns named 'two'"):
        columns.groups(frame, "two")


def test_errors_name_the_table_and_the_argument():
    with pytest.raises(VocabularyMismatchError, match=r"`gene_key` is 'x', which is not a column of `adata.var`"):
        columns.gene_names(pd.DataFrame(index=["a"]), "x")
    with pytest.raises(LabelsError, match=r"`test_key` is 'x'.*Columns: c"):
        columns.truth(obs(["a"]), "x")
