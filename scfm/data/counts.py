"""Blocks of raw counts: their canonical form, checks, totals and log-normalization."""

# Axes: B cells, G genes.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.data.compiled_encoder import encoder_module, encoder_threads
from scfm.errors import CountsError

# log1p of ten million counts is 16. Fractions above that come from scaling, not from a logarithm.
_MAX_LOG = 16.0
# float64 represents every whole number up to here, so sums of counts are exact.
MAX_COUNT = 2.0**53
_CHUNK = 1 << 20
TARGET_SUM = 1e4


def canonical_csr(block: Any, *, name: str = "the matrix") -> sp.csr_matrix:
    """Return a block of rows as a CSR matrix in canonical form.

    In this form values are integers, float32, float64 or booleans in native byte order, and column indices are int32 or
    int64, ascending and distinct in each row. Several entries of one cell and gene are summed. Arrays that already have
    this form are shared with `block`.

    Parameters
    ----------
    block
        Rows of a matrix, dense or sparse, of any dtype.
    name
        Name of the matrix in error messages.

    Raises
    ------
    CountsError
        If entries are masked or not numbers, or a column index is out of range.
    """
    if not sp.issparse(block):
        return sp.csr_matrix(native_numbers(np.asanyarray(block), name=name))
    block = block if block.format == "csr" else block.tocsr()
    check_pointers(block.indptr, len(block.data), len(block.indices), block.shape[0])
    # scipy caches whether a matrix is canonical, even after its arrays were replaced. A new matrix has no such cache.
    rows = sp.csr_matrix(block.shape, dtype=np.int8)
    rows.data = native_numbers(block.data, name=name)
    rows.indices = signed_indices(block.indices)
    rows.indptr = block.indptr.astype(rows.indices.dtype if len(rows.data) < 2**31 else np.int64, copy=False)
    is_canonical = rows.has_canonical_format
    filled = np.diff(rows.indptr) > 0
    ends = (rows.indptr[:-1][filled], rows.indptr[1:][filled] - 1)
    _require_range(rows.indices[np.concatenate(ends)] if is_canonical else rows.indices, block.shape[1], name)
    if is_canonical:
        return rows
    kind, n_entries = rows.data.dtype, len(rows.data)
    rows.data = rows.data.astype(
        {"f": np.float64, "u": np.uint64}.get(kind.kind, np.int64)
    )  # a sum may need a wider type
    rows.indices = rows.indices.copy()
    rows.sum_duplicates()
    if len(rows.data) == n_entries:  # indices were distinct, only not sorted
        rows.data = rows.data.astype(kind)
    return rows


def native_numbers(values: NDArray[Any], *, name: str) -> NDArray[Any]:
    """Return numbers as integers, float32, float64 or booleans in native byte order, without a copy if possible.

    Raises
    ------
    CountsError
        If the values are not numbers, or some are masked.
    """
    if isinstance(values, np.ma.MaskedArray):
        if n_masked := int(np.ma.getmaskarray(values).sum()):
            raise CountsError(
                f"{name} is a masked array with {n_masked} masked values, but counts cannot be missing. Remove these "
                "cells or genes, or fill the values (`.filled(0)`)."
            )
        values = values.data
    if values.dtype.kind not in "uibf":
        raise CountsError(
            f"{name} has dtype {values.dtype}; counts must be integers, floats or booleans. Convert them, for example by "
            "`.astype('float32')`."
        )
    if values.dtype.kind == "f" and values.dtype.itemsize not in (4, 8):
        values = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    values = values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))
    return values if values.ndim > 1 else np.ascontiguousarray(values)


def signed_indices(indices: NDArray[Any]) -> NDArray[Any]:
    """Return column indices or row pointers as contiguous int32 or int64 in native byte order."""
    if indices.dtype.kind == "i" and indices.dtype.itemsize >= 4 and indices.dtype.isnative:
        return np.ascontiguousarray(indices)
    return indices.astype(np.int64)


def check_pointers(indptr: NDArray[Any], n_entries: int, n_indices: int, n_rows: int) -> None:
    """Raise `CountsError` unless row pointers ascend from 0 to the number of entries."""
    if len(indptr) != n_rows + 1:
        raise CountsError(f"The sparse matrix has {n_rows} rows, but {len(indptr)} row pointers: the data are damaged.")
    if indptr[0] != 0 or indptr[-1] != n_entries or n_indices != n_entries or (indptr[1:] < indptr[:-1]).any():
        raise CountsError(
            f"The row pointers ({indptr.dtype}) of the sparse matrix do not ascend from 0 to its {n_entries} entries. "
            "More than 2^31 - 1 entries need int64 pointers: build the matrix with `indptr` and `indices` of int64."
        )


def _require_range(indices: NDArray[Any], n_vars: int, name: str) -> None:
    if len(indices) and not 0 <= (low := int(indices.min())) <= (high := int(indices.max())) < n_vars:
        raise CountsError(
            f"{name} has the column index {low if low < 0 else high}, but only {n_vars} columns: the matrix is damaged. Build "
            "it again from its source."
        )


def log_normalize(counts_BG: Any, depth_B: NDArray[np.floating] | None = None) -> sp.csr_matrix:
    """Return log1p of counts per 10,000, shape (B, G), CSR float32.

    Parameters
    ----------
    counts_BG
        Raw counts, shape (B, G), dense or sparse.
    depth_B
        Total counts of each cell, shape (B,), if the matrix holds only some of the genes. None to sum the rows.

    Examples
    --------
    >>> import numpy as np, scfm
    >>> from scipy.sparse import csr_matrix
    >>> scfm.baselines.log_normalize(csr_matrix([[1.0, 3.0]])).toarray().astype(float).round(2).tolist()
    [[7.82, 8.92]]
    """
    expression_BG = sp.csr_matrix(canonical_csr(counts_BG), dtype=np.float32, copy=True)
    depth_B = np.asarray(expression_BG.sum(1)).ravel() if depth_B is None else np.asarray(depth_B, dtype=np.float64)
    scale_B = TARGET_SUM / np.maximum(depth_B, 1e-12)
    expression_BG.data *= np.repeat(scale_B, np.diff(expression_BG.indptr)).astype(np.float32)
    np.log1p(expression_BG.data, out=expression_BG.data)
    return expression_BG


def row_totals(block: sp.csr_matrix) -> NDArray[np.float64]:
    """Sum each row in float64, shape (n,). The sums of counts are exact."""
    host = encoder_module()
    if host is not None:
        return host.row_totals(block.indptr, block.data, encoder_threads())
    totals = np.zeros(block.shape[0])
    filled = np.diff(block.indptr) > 0
    if filled.any():
        totals[filled] = np.add.reduceat(block.data, block.indptr[:-1][filled].astype(np.intp), dtype=np.float64)
    return totals


def survey(values: NDArray[Any]) -> tuple[float, float, int]:
    """Return minimum, maximum and the number of fractions; minimum or maximum are NaN or infinite if any value is."""
    if values.size == 0 or values.dtype.kind == "b":
        return 0.0, float(values.size > 0), 0
    if values.dtype.kind in "ui":
        return float(values.min()), float(values.max()), 0
    host = encoder_module()
    if host is not None and values.dtype in (np.float32, np.float64):
        return host.survey(values, encoder_threads())
    low, high, fractions = np.inf, -np.inf, 0
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())  # both propagate NaN
        with np.errstate(invalid="ignore"):
            fractions += int(np.count_nonzero(chunk != np.rint(chunk)))
    return float(low), float(high), fractions


def check_counts(block: sp.csr_matrix, *, name: str, advice: Callable[[], str]) -> float:
    """Return the smallest entry; raise unless every entry is a raw count (finite, whole and not negative).

    Parameters
    ----------
    block
        Rows to check.
    name
        Name of the matrix in error messages.
    advice
        Returns what to do instead; called only on failure.

    Raises
    ------
    CountsError
        If an entry is not a raw count. The message has the value and `advice`.
    """
    low, high, fractions = survey(block.data)
    if low >= 0 and high <= MAX_COUNT and fractions == 0:
        return low
    if not (np.isfinite(low) and np.isfinite(high)):
        value = next(value for value in (low, high) if not np.isfinite(value))
        kind = "NaN" if np.isnan(value) else "infinite values"
        raise CountsError(f"{name} holds {kind} ({value}); counts must be finite. Remove these cells. {advice()}")
    if low < 0:
        looks = "it looks scaled or regressed out" if fractions else "counts cannot be negative"
        raise CountsError(f"{name} holds negative values (smallest {low:g}); {looks}. {advice()}")
    if fractions == 0:
        raise CountsError(f"{name} holds the value {high:.4g}; counts are at most 2^53. Correct or remove these cells.")
    share = fractions / block.data.size
    looks = "log-normalized" if high < _MAX_LOG else "normalized"
    raise CountsError(
        f"{name} holds fractions ({share:.0%} of the non-zero values, largest {high:.4g}): it looks {looks}, and raw "
        f"counts are needed. {advice()} Counts corrected for ambient RNA or multi-mapping must be rounded first."
    )
