"""The streamed decomposition: the subspace of an exact one, from any blocks."""

import numpy as np
import pytest
from scipy import linalg, sparse

from scfm.train.loadings import streamed_loadings


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
    found = streamed_loadings(blocks_of(X, size), 150, 6)
    assert found.shape == (150, 6)
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-10)
    cosine = linalg.svdvals(found.T @ right[:6].T)
    assert cosine.min() > 0.999
    caught = np.linalg.norm(X @ found) ** 2
    assert caught > 0.9999 * (strength[:6] ** 2).sum()


def test_more_passes_are_more_exact_and_the_seed_is_all_chance():
    X = matrix()
    exact = linalg.svd(X.toarray(), full_matrices=False)[2][:6]
    errors = [
        1 - linalg.svdvals(streamed_loadings(blocks_of(X, 100), 150, 6, n_passes=n).T @ exact.T).min()
        for n in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2]
    one, same = (streamed_loadings(blocks_of(X, 100), 150, 6, seed=3) for _ in range(2))
    assert np.array_equal(one, same)


@pytest.mark.parametrize(("n_rows", "n_columns", "expected"), [(4, 150, 4), (400, 5, 5)])
def test_there_are_no_more_components_than_rows_or_columns(n_rows, n_columns, expected):
    X = matrix(n_rows, n_columns)
    found = streamed_loadings(blocks_of(X, 3), n_columns, 50)
    assert found.shape == (n_columns, expected)
    np.testing.assert_allclose(found.T @ found, np.eye(expected), atol=1e-6)


def test_no_counts_are_no_components():
    assert streamed_loadings(lambda: [sparse.csr_matrix((3, 20))], 20, 5).shape == (20, 0)
