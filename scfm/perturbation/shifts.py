"""Cosine shifts, and statistics of them in memory that does not grow with the number of cells."""

# Axes: V variants, D model width, R rows (perturbations), M measures, K kept values of a row.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from scfm.encoding.hashing import hash_pairs

KEPT = 512  # values per row for rank-sum tests and bootstraps; a random sample if a row has more


def unit(vectors_VD: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return vectors divided by their norm, float64; zero vectors are unchanged."""
    doubled = vectors_VD.astype(np.float64)
    return doubled / np.maximum(np.linalg.norm(doubled, axis=-1, keepdims=True), 1e-300)


def cosine_distance(before_VD: NDArray[np.floating], after_VD: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return 1 - cosine similarity, shape (V,), as half the squared distance of unit vectors, which is exact for small shifts."""
    return 0.5 * ((unit(before_VD) - unit(after_VD)) ** 2).sum(-1)


def goal_shift(
    before_VD: NDArray[np.floating], after_VD: NDArray[np.floating], goal_D: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return cos(after, goal) - cos(before, goal), shape (V,), as one product, which is exact for small shifts."""
    return (unit(after_VD) - unit(before_VD)) @ unit(goal_D)


class ShiftRecord:
    """Counts, means, standard deviations and a random sample of limited size, for several measures per row.

    Parameters
    ----------
    measures
        Names of the measures.
    seed
        Seed of the sample. The kept values depend on seed, row and cell, and not on the order in which they are added.
    """

    def __init__(self, measures: Sequence[str], *, n_rows: int, seed: int = 0) -> None:
        self.measures = tuple(measures)
        self.seed = seed
        self.n_R = np.zeros(n_rows, dtype=np.int64)
        self.mean_RM = np.zeros((n_rows, len(self.measures)))
        self.squares_RM = np.zeros((n_rows, len(self.measures)))  # sums of squared deviations from the mean
        self._kept: dict[int, tuple[NDArray[np.uint64], NDArray[np.float64]]] = {}

    def add(self, row_V: NDArray[np.int64], cell_V: NDArray[np.int64], values_VM: NDArray[np.float64]) -> None:
        """Add the values of each variant."""
        order = np.argsort(row_V, kind="stable")
        row_V, cell_V, values_VM = row_V[order], cell_V[order], values_VM[order]
        rows, starts = np.unique(row_V, return_index=True)
        for row, span_start, span_stop in zip(rows.tolist(), starts, [*starts[1:], len(row_V)]):
            self._add_row(row, cell_V[span_start:span_stop], values_VM[span_start:span_stop])

    def _add_row(self, row: int, cells: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        n_new, mean_M = len(values), values.mean(0)
        self._add_moments(row, n_new, mean_M, ((values - mean_M) ** 2).sum(0))
        self._keep(row, hash_pairs(self.seed, cells, np.full(n_new, row)), values)

    def _add_moments(self, row: int, n_new: int, mean_M: NDArray[np.float64], squares_M: NDArray[np.float64]) -> None:
        """Merge counts, means and sums of squares (Chan, Golub and LeVeque 1983)."""
        n_old = int(self.n_R[row])
        step, total = mean_M - self.mean_RM[row], n_old + n_new
        self.squares_RM[row] += squares_M + step**2 * n_old * n_new / total
        self.mean_RM[row] += step * n_new / total
        self.n_R[row] = total

    def _keep(self, row: int, keys: NDArray[np.uint64], values: NDArray[np.float64]) -> None:
        """Add values to the sample of a row, which consists of the values with the lowest keys."""
        if row in self._kept:
            keys = np.concatenate([self._kept[row][0], keys])
            values = np.concatenate([self._kept[row][1], values])
        if len(keys) > KEPT:
            chosen = np.argpartition(keys, KEPT)[:KEPT]
            keys, values = keys[chosen], values[chosen]
        self._kept[row] = keys, values

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows with values, ascending."""
        return np.flatnonzero(self.n_R)

    def values(self, row: int, measure: str) -> NDArray[np.float64]:
        """Return all values of a row, or a random sample if there are more than `KEPT`, in a fixed order."""
        keys, values = self._kept[row]
        return values[np.argsort(keys, kind="stable"), self.measures.index(measure)]

    def mean(self, measure: str) -> NDArray[np.float64]:
        """Return the mean of each of `rows`."""
        return self.mean_RM[self.rows, self.measures.index(measure)]

    def std(self, measure: str) -> NDArray[np.float64]:
        """Return the standard deviation of each of `rows`; NaN for rows with one value."""
        rows = self.rows
        squares, freedom = self.squares_RM[rows, self.measures.index(measure)], self.n_R[rows] - 1
        return np.where(freedom > 0, np.sqrt(squares / np.maximum(freedom, 1)), np.nan)

    def only(self, measure: str) -> ShiftRecord:
        """Return the record with only one measure."""
        column = self.measures.index(measure)
        part = ShiftRecord([measure], n_rows=len(self.n_R), seed=self.seed)
        part.n_R = self.n_R
        part.mean_RM, part.squares_RM = self.mean_RM[:, [column]], self.squares_RM[:, [column]]
        part._kept = {row: (keys, values[:, [column]]) for row, (keys, values) in self._kept.items()}
        return part

    def of_rows(self, rows: NDArray[np.int64]) -> ShiftRecord:
        """Return the record of some rows, which are numbered 0, 1, ... in it."""
        part = ShiftRecord(self.measures, n_rows=len(rows), seed=self.seed)
        part.n_R, part.mean_RM, part.squares_RM = self.n_R[rows], self.mean_RM[rows], self.squares_RM[rows]
        part._kept = {index: self._kept[row] for index, row in enumerate(rows.tolist()) if row in self._kept}
        return part

    def renumbered(self, row_R: NDArray[np.int64], *, n_rows: int) -> ShiftRecord:
        """Return the record with row r renumbered to `row_R[r]`, with `n_rows` rows."""
        moved = ShiftRecord(self.measures, n_rows=n_rows, seed=self.seed)
        moved.n_R[row_R], moved.mean_RM[row_R], moved.squares_RM[row_R] = self.n_R, self.mean_RM, self.squares_RM
        moved._kept = {int(row_R[row]): kept for row, kept in self._kept.items()}
        return moved

    def to_arrays(self) -> dict[str, NDArray]:
        """Return all content as arrays, for saving."""
        rows = sorted(self._kept)
        lengths = [len(self._kept[row][0]) for row in rows]
        none = (np.zeros(0, np.uint64), np.zeros((0, len(self.measures))))
        return {
            "n": self.n_R,
            "mean": self.mean_RM,
            "squares": self.squares_RM,
            "kept_rows": np.repeat(np.array(rows, dtype=np.int64), lengths),
            "kept_keys": np.concatenate([none[0], *(self._kept[row][0] for row in rows)]),
            "kept_values": np.concatenate([none[1], *(self._kept[row][1] for row in rows)]),
        }

    def set_merged(self, parts: Sequence[Mapping[str, NDArray]]) -> None:
        """Replace the content by the merged content of several records of different cells (results of `to_arrays`).

        Samples are the same as for one record of all cells; means and standard deviations are equal up to rounding.
        """
        first, *others = parts
        self.set_arrays(first)
        for arrays in others:
            other = ShiftRecord(self.measures, n_rows=len(self.n_R), seed=self.seed)
            other.set_arrays(arrays)
            for row in other.rows.tolist():
                self._add_moments(row, int(other.n_R[row]), other.mean_RM[row], other.squares_RM[row])
                self._keep(row, *other._kept[row])

    def set_arrays(self, arrays: Mapping[str, NDArray]) -> None:
        """Replace the content by the result of `to_arrays`."""
        self.n_R, self.mean_RM, self.squares_RM = (arrays[name].copy() for name in ("n", "mean", "squares"))
        rows, starts = np.unique(arrays["kept_rows"], return_index=True)
        self._kept = {
            int(row): (arrays["kept_keys"][start:stop], arrays["kept_values"][start:stop])
            for row, start, stop in zip(rows, starts, [*starts[1:], len(arrays["kept_rows"])])
        }
