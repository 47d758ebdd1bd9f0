"""What raw counts are: the checks that every block passes, and the totals of its cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm.data.host import host_module, host_threads
from scfm.errors import CountsError

# log1p of ten million counts is 16; counts with fractions above that were scaled, not logged.
_LARGEST_LOG = 16.0
_CHUNK = 1 << 20


def row_totals(block: sp.csr_matrix) -> NDArray[np.float64]:
    """Sum each row in float64, shape (n,); exact for counts."""
    host = host_module()
    if host is not None:
        return host.row_totals(block.indptr, block.data, host_threads())
    totals = np.zeros(block.shape[0])
    filled = np.diff(block.indptr) > 0
    if filled.any():
        totals[filled] = np.add.reduceat(block.data, block.indptr[:-1][filled].astype(np.intp), dtype=np.float64)
    return totals


def survey(values: NDArray[Any]) -> tuple[float, float, int]:
    """Smallest and largest value, and how many are fractions; NaN and infinities show in smallest and largest."""
    if values.size == 0 or values.dtype.kind == "b":
        return 0.0, float(values.size > 0), 0
    if values.dtype.kind in "ui":
        return float(values.min()), float(values.max()), 0
    host = host_module()
    if host is not None and values.dtype in (np.float32, np.float64):
        return host.survey(values, host_threads())
    low, high, fractions = np.inf, -np.inf, 0
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())  # both propagate NaN
        with np.errstate(invalid="ignore"):
            fractions += int(np.count_nonzero(chunk != np.rint(chunk)))
    return float(low), float(high), fractions


def check_counts(block: sp.csr_matrix, *, name: str, advice: Callable[[], str]) -> None:
    """Raise unless every number is a raw count: finite, whole, not negative.

    Parameters
    ----------
    block
        Rows to check.
    name
        What to call the matrix.
    advice
        Called only on failure; says what to do instead.

    Raises
    ------
    CountsError
        With the value seen, what it looks like, and `advice`.
    """
    if block.data.dtype.kind not in "uibf":
        raise CountsError(f"{name} has dtype {block.data.dtype}; counts must be integers, floats or booleans.")
    low, high, fractions = survey(block.data)
    if low >= 0 and np.isfinite(high) and fractions == 0:
        return
    if not (np.isfinite(low) and np.isfinite(high)):
        value = next(value for value in (low, high) if not np.isfinite(value))
        kind = "NaN" if np.isnan(value) else "infinite values"
        raise CountsError(
            f"{name} holds {kind} ({value}); counts must be finite. Remove or mend these cells. {advice()}"
        )
    if low < 0:
        looks = "it looks scaled or regressed out" if fractions else "counts cannot be negative"
        raise CountsError(f"{name} holds negative values (smallest {low:g}); {looks}. {advice()}")
    share = fractions / block.data.size
    looks = "log-normalised" if high < _LARGEST_LOG else "normalised"
    raise CountsError(
        f"{name} holds fractions ({share:.0%} of the non-zero values, largest {high:.4g}): it looks {looks}, and raw "
        f"counts are needed. {advice()} Counts corrected for ambient RNA or multi-mapping must be rounded first."
    )


def looks_like_counts(matrix: Any, *, rows: int = 200) -> bool:
    """Whether the first rows of any kind of matrix are raw counts (and not all zero)."""
    block = matrix[: min(rows, matrix.shape[0])]
    values = block.data if sp.issparse(block) else np.asarray(block).ravel()
    if values.size == 0 or values.dtype.kind not in "uibf":
        return False
    low, high, fractions = survey(values)
    return bool(low >= 0 and np.isfinite(high) and fractions == 0 and high > 0)
