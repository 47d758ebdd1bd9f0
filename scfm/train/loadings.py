"""Singular vectors of a matrix that is read in blocks of rows, such as the cells of many files; Pearson residuals of counts."""

# Axes: B rows (cells), V columns (tokens), R components, L sketched directions.

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

Block: TypeAlias = sparse.csr_matrix | LinearOperator
OVERSAMPLING = 10  # number of random directions in excess of components
N_PASSES = 4
CLIP = 10.0  # of residuals: a gene with few counts, many of them in one cell, would otherwise be a component of its own


def streamed_loadings(
    blocks: Callable[[], Iterable[Block]],
    n_columns: int,
    n_components: int,
    *,
    n_passes: int = N_PASSES,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the leading right singular vectors of a matrix that does not fit memory, and its singular values.

    Parameters
    ----------
    blocks
        Function that is called once per pass, and returns the rows of the matrix in blocks of shape (B, V): CSR, or any linear
        operator, such as `pearson_residuals`.
    n_columns
        Number of columns V.
    n_components
        Number of vectors R. The result has fewer if the matrix has fewer rows or columns.
    n_passes
        Number of passes over the rows. Each pass divides the error of a component by the ratio of its squared singular value
        to that of the first component that is not computed.
    seed
        Seed of the random directions.

    Returns
    -------
    Vectors of shape (V, R) and values of shape (R,), in descending order.

    Notes
    -----
    The method is the randomized range finder with subspace iteration of Halko, Martinsson and Tropp (2011), algorithms 4.4
    and 5.5 (Nystrom), applied to X^T X. Each pass accumulates Y = X^T (X Q) over blocks, so memory holds a few matrices of V
    by R + 10 numbers and one block. Between passes Y is orthonormalized by a QR decomposition. scikit-learn's
    IncrementalPCA makes blocks dense and centers them, and its TruncatedSVD needs the whole matrix at once.
    """
    rng = np.random.default_rng(seed)
    width = min(n_components + OVERSAMPLING, n_columns)
    basis_VL, _ = linalg.qr(rng.standard_normal((n_columns, width)), mode="economic")
    for _ in range(n_passes - 1):
        basis_VL, _ = linalg.qr(_gram_product(blocks(), basis_VL)[0], mode="economic")
    product_VL, n_rows = _gram_product(blocks(), basis_VL)
    # Nystrom: X^T X is close to Y (Q^T Y)^-1 Y^T, whose eigenvectors are the left singular vectors of Y (Q^T Y)^-1/2.
    core_LL = basis_VL.T @ product_VL
    values_L, vectors_LL = linalg.eigh((core_LL + core_LL.T) / 2)
    kept = values_L > values_L.max(initial=0) * np.finfo(np.float32).eps
    factor_VL = product_VL @ (vectors_LL[:, kept] / np.sqrt(values_L[kept]))
    left_VL, strength_L, _ = linalg.svd(factor_VL, full_matrices=False)
    n_components = min(n_components, n_rows, int((strength_L > 0).sum()))
    return _with_fixed_signs(left_VL[:, :n_components]), strength_L[:n_components]


def residual_loadings(
    counts: Callable[[], Iterable[sparse.csr_matrix]], n_columns: int, n_components: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Return loadings of genes on the leading components of Pearson residuals, shape (V, R).

    A column is a right singular vector times the square root of its singular value, so a component counts by its strength.

    Parameters
    ----------
    counts
        Function that is called once per pass, and returns raw counts in blocks of shape (B, V), CSR.
    n_columns, n_components, seed
        As in `streamed_loadings`.
    """
    total_V = np.zeros(n_columns)
    for block in counts():
        total_V += np.asarray(block.sum(0), dtype=np.float64).ravel()
    fraction_V = total_V / max(1.0, total_V.sum())
    vectors_VR, strength_R = streamed_loadings(
        lambda: (pearson_residuals(block, fraction_V) for block in counts()), n_columns, n_components, seed=seed
    )
    return vectors_VR * np.sqrt(strength_R)


def pearson_residuals(counts_BV: sparse.csr_matrix, fraction_V: NDArray[np.float64]) -> LinearOperator:
    """Return the Pearson residuals (x - m) / sqrt(m) of counts, limited to `CLIP`, as a linear operator of shape (B, V).

    m is the count that a cell of this depth would have if all cells had the same profile (Lause, Berens and Kobak 2021, with
    Poisson noise).

    Parameters
    ----------
    counts_BV
        Raw counts, shape (B, V), CSR.
    fraction_V
        Fraction of all counts that each gene has, shape (V,); positive where a gene has counts.

    Notes
    -----
    With the depth n and the fraction p, m = n p. Where x is 0 the residual is -sqrt(n) sqrt(p), so the residuals are a sparse
    matrix less an outer product, and are never stored as a dense matrix.
    """
    root_B, root_V = np.sqrt(np.asarray(counts_BV.sum(1), dtype=np.float64).ravel()), np.sqrt(fraction_V)
    root_mean = np.repeat(root_B, np.diff(counts_BV.indptr)) * root_V[counts_BV.indices]
    values = np.minimum(counts_BV.data / np.maximum(root_mean, 1e-300) - root_mean, CLIP) + root_mean
    excess_BV = sparse.csr_matrix((values, counts_BV.indices, counts_BV.indptr), shape=counts_BV.shape)
    return aslinearoperator(excess_BV) - aslinearoperator(root_B[:, None]) @ aslinearoperator(root_V[None, :])


def _gram_product(blocks: Iterable[Block], basis_VL: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Return X^T (X Q) over all blocks of X, and the number of rows."""
    product_VL, n_rows = np.zeros_like(basis_VL), 0
    for block in blocks:
        product_VL += block.T @ (block @ basis_VL)
        n_rows += block.shape[0]
    return product_VL, n_rows


def _with_fixed_signs(vectors_VR: NDArray[np.float64]) -> NDArray[np.float64]:
    """Change the sign of each column so that its largest element is positive."""
    largest_R = np.abs(vectors_VR).argmax(0)
    return vectors_VR * np.sign(vectors_VR[largest_R, np.arange(vectors_VR.shape[1])])
