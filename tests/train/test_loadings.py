"""The streamed decomposition: the subspace of an exact one, from any blocks."""

import numpy as np
import pytest
from scipy import linalg, sparse

from scfm.train.loadings import CLIP, pearson_residuals, residual_loadings, streamed_loadings


def matrix(n_rows=400, n_columns=150, rank=8, seed=0):
    """Sparse counts of a few programs, with noise."""
    rng = np.random.default_rng(seed)
    programs = rng.gamma(0.3, 2.0, (rank, n_columns))
    weights = rng.dirichlet(np.full(rank, 0.2), n_rows)
    return sparse.csr_matrix(np.log1p(rng.poisson(3 * weights @ programs)).astype(np.float32))


def blocks_of(X, size):
    return lambda: (X[start : start + size] for start in range(0, X.shape[0], size))


@pytest.mark.parametrize("size", [1, 64, 400])
def test_it_is_the_exact_decomposition_whatever_the_blocks(size):
    X = matrix()
    _, strength, right = linalg.svd(X.toarray(), full_matrices=False)
    found, values = streamed_loadings(blocks_of(X, size), 150, 6)
    assert found.shape == (150, 6)
    np.testing.assert_allclose(values, strength[:6], rtol=1e-4)
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-10)
    cosine = linalg.svdvals(found.T @ right[:6].T)
    assert cosine.min() > 0.999
    caught = np.linalg.norm(X @ found) ** 2
    assert caught > 0.9999 * (strength[:6] ** 2).sum()


def test_more_passes_are_more_exact_and_the_seed_is_all_chance():
    X = matrix()
    exact = linalg.svd(X.toarray(), full_matrices=False)[2][:6]
    errors = [
        1 - linalg.svdvals(streamed_loadings(blocks_of(X, 100), 150, 6, n_passes=n)[0].T @ exact.T).min()
        for n in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2]
    one, same = (streamed_loadings(blocks_of(X, 100), 150, 6, seed=3)[0] for _ in range(2))
    assert np.array_equal(one, same)


@pytest.mark.parametrize(("n_rows", "n_columns", "expected"), [(4, 150, 4), (400, 5, 5)])
def test_there_are_no_more_components_than_rows_or_columns(n_rows, n_columns, expected):
    X = matrix(n_rows, n_columns)
    found, _ = streamed_loadings(blocks_of(X, 3), n_columns, 50)
    assert found.shape == (n_columns, expected)
    np.testing.assert_allclose(found.T @ found, np.eye(expected), atol=1e-6)


def test_no_counts_are_no_components():
    assert streamed_loadings(lambda: [sparse.csr_matrix((3, 20))], 20, 5)[0].shape == (20, 0)


def counts_of(n_rows=200, n_columns=80):
    """Counts of three programs; one gene has all its counts in one cell, and one gene has none."""
    rng = np.random.default_rng(4)
    counts = rng.poisson(rng.dirichlet(np.ones(3), n_rows) @ rng.gamma(0.4, 4.0, (3, n_columns)))
    counts[:, 0], counts[:, 1] = 0, 0
    counts[7, 0] = 40
    return counts.astype(np.float32)


def dense_residuals(counts):
    with np.errstate(invalid="ignore"):
        mean = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        return np.nan_to_num(np.minimum((counts - mean) / np.sqrt(mean), CLIP))


def test_residuals_are_those_of_the_definition():
    counts = counts_of()
    expected = dense_residuals(counts.astype(np.float64))
    assert expected.max() == CLIP
    found = pearson_residuals(sparse.csr_matrix(counts), counts.sum(0) / counts.sum())
    right, left = np.eye(counts.shape[1]), np.eye(counts.shape[0])
    np.testing.assert_allclose(found @ right, expected, atol=1e-5)
    np.testing.assert_allclose(found.T @ left, expected.T, atol=1e-5)


@pytest.mark.parametrize("size", [7, 200])
def test_loadings_of_residuals_are_scaled_singular_vectors(size):
    counts = counts_of()
    _, strength, right = linalg.svd(dense_residuals(counts.astype(np.float64)), full_matrices=False)
    found = residual_loadings(blocks_of(sparse.csr_matrix(counts), size), counts.shape[1], 2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0) ** 2, strength[:2], rtol=1e-4)
    cosine = linalg.svdvals((found / np.linalg.norm(found, axis=0)).T @ right[:2].T)
    assert cosine.min() > 0.999


def test_cells_without_counts_have_no_residuals():
    assert not residual_loadings(lambda: [sparse.csr_matrix((3, 20))], 20, 5).size
