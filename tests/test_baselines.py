"""The baselines: what they see, and the scores they are given."""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from scfm import baselines


def test_log_normalize_is_scanpys():
    import anndata
    import scanpy as sc

    counts = sp.csr_matrix(np.random.default_rng(0).poisson(1, (30, 20)).astype(np.float32))
    adata = anndata.AnnData(counts.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(baselines.log_normalize(counts).toarray(), adata.X.toarray(), rtol=1e-5)
    half_seen = baselines.log_normalize(counts, depth_B=2 * np.asarray(counts.sum(1)).ravel())
    np.testing.assert_allclose(np.expm1(half_seen.toarray()).sum(1), 5e3, rtol=1e-4)


def test_macro_f1_counts_classes_that_occur_in_the_truth():
    scored = baselines.scores(["a", "a", "b", "b"], ["a", "a", "b", "c"])
    assert scored["accuracy"] == pytest.approx(3 / 4)
    assert scored["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert scored["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 150)
    means = rng.gamma(1, 2, (3, 30))
    return baselines.log_normalize(sp.csr_matrix(rng.poisson(means[codes]).astype(np.float32))), codes


def test_only_the_transductive_row_depends_on_test_cells(cells):
    expression, codes = cells
    learn, test = np.arange(100), np.arange(100, 150)
    names = np.array(["x", "y", "z"])
    table = baselines.score_annotation_baselines(expression, names, codes, learn=learn, test=test)
    assert table.loc["logistic regression (balanced)", "accuracy"] > 0.9
    assert table.loc["majority class", "accuracy"] == np.mean(codes[test] == np.bincount(codes[learn]).argmax())
    assert (table["setting"] == "transductive").sum() == 1


def test_labels_of_test_cells_are_not_read(cells):
    expression, codes = cells
    learn, test = np.arange(100), np.arange(100, 150)
    names = np.array(["x", "y", "z"])
    true = baselines.score_annotation_baselines(expression, names, codes, learn=learn, test=test)
    turned = np.where(np.arange(150) < 100, codes, (codes + 1) % 3)
    wrong = baselines.score_annotation_baselines(expression, names, turned, learn=learn, test=test)
    # The same predictions against other labels: what was right is wrong.
    assert (true["accuracy"] + wrong["accuracy"] <= 1 + 1e-12).all()
    assert wrong.loc["logistic regression (balanced)", "accuracy"] < 0.1


def test_a_regression_on_turned_rows_is_the_regression_on_genes():
    rng = np.random.default_rng(0)
    learn, test = (sp.csr_matrix(rng.poisson(0.5, (rows, 200)).astype(np.float64)) for rows in (40, 20))
    codes = rng.integers(0, 3, 40)
    regression = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=5000)
    turned = make_pipeline(baselines.RowSpace(), regression).fit(learn, codes).predict_proba(test)
    np.testing.assert_allclose(turned, regression.fit(learn, codes).predict_proba(test), atol=1e-5)
    many = test.T.tocsr()  # more rows than columns: as they are
    np.testing.assert_array_equal(baselines.RowSpace().fit(many).transform(many).toarray(), many.toarray())


def test_coordinates_while_fitting_are_those_of_transform_and_genes_without_counts_weigh_nothing():
    rng = np.random.default_rng(1)
    learn = sp.csr_matrix(rng.poisson(0.5, (30, 100)) * (np.arange(100) % 3 > 0.0))
    space = baselines.RowSpace()
    coordinates = space.fit_transform(learn)
    np.testing.assert_allclose(coordinates, space.transform(learn), atol=1e-6)  # the diagonal grew by 1e-8
    weights = space.weights_of_columns(rng.normal(size=(2, coordinates.shape[1])))
    assert weights.shape == (100, 2)
    assert (weights[::3] == 0).all()
    np.testing.assert_allclose(coordinates @ coordinates.T, (learn @ learn.T).toarray(), rtol=1e-7, atol=1e-9)


def test_products_of_cells_that_occur_twice_have_a_factor_in_spite_of_rounding_errors():
    once = np.random.default_rng(0).poisson(0.5, (50, 200)).astype(np.float64)
    rows = np.vstack([once, once])
    product = rows @ rows.T
    unit = np.diag(product).mean()
    rounded = product - 5e-8 * unit * np.eye(100)  # eigenvalues below 0, as products in float32 can have
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(rounded + baselines.RELATIVE_JITTERS[0] * unit * np.eye(100))
    factor = baselines._lower_factor(rounded)
    np.testing.assert_allclose(factor @ factor.T, product, atol=2e-7 * unit)
    with pytest.raises(np.linalg.LinAlgError):
        baselines._lower_factor(product - 0.1 * unit * np.eye(100))


def test_equal_rows_and_rows_without_counts_can_be_projected():
    rows = sp.csr_matrix(np.repeat([[0.0, 1, 2, 0, 3], [0, 0, 0, 0, 0]], 2, axis=0))
    for learn in (rows, rows[2:]):
        space = baselines.RowSpace()
        coordinates = space.fit_transform(learn)
        np.testing.assert_allclose(coordinates @ coordinates.T, (learn @ learn.T).toarray(), rtol=1e-7, atol=1e-6)
        assert np.isfinite(space.transform(rows)).all()
        assert np.isfinite(space.weights_of_columns(np.ones((2, coordinates.shape[1])))).all()
