"""Statistics of shifts: confidence intervals, tests and effect sizes against a null."""

# Axes: R rows (perturbations), N values of one row.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from scfm.perturbation.shifts import ShiftRecord

ALL_OTHERS = "all other perturbations"


@dataclass(frozen=True)
class Null:
    """The rows of a record whose values are the null for other rows.

    Attributes
    ----------
    rows
        Numbers of these rows, ascending.
    name
        Description of the null.
    only
        Rows that were not requested and serve only as null; they are not counted in the false discovery rate.
    """

    rows: NDArray[np.int64]
    name: str
    only: NDArray[np.int64]

    def among(self, numbers: NDArray[np.int64]) -> Null:
        """Return the null for a record whose rows 0, 1, ... are the rows `numbers` of this one."""
        return Null(np.flatnonzero(np.isin(numbers, self.rows)), self.name, np.flatnonzero(np.isin(numbers, self.only)))


def describe(record: ShiftRecord, measure: str, *, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return mean, standard deviation, standard error and 95 % bootstrap interval over cells for each of `record.rows`."""
    n_R, mean_R, std_R = record.n_R[record.rows], record.mean(measure), record.std(measure)
    columns = {f"{measure}_mean": mean_R, f"{measure}_std": std_R, f"{measure}_sem": std_R / np.sqrt(n_R)}
    if n_bootstrap:
        bounds = [
            bootstrap_interval(record.values(row, measure), n_bootstrap=n_bootstrap, seed=seed + int(row))
            for row in record.rows
        ]
        columns[f"{measure}_low"], columns[f"{measure}_high"] = np.array(bounds).reshape(-1, 2).T
    return pd.DataFrame(columns)


def bootstrap_interval(values_N: NDArray[np.float64], *, n_bootstrap: int, seed: int) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % percentiles of the mean of resampled values; NaN for a single value."""
    if len(values_N) < 2:
        return np.nan, np.nan
    # Counts of how often each value is drawn, so that one matrix product computes all means.
    draws = np.random.default_rng(seed).multinomial(
        len(values_N), np.full(len(values_N), 1 / len(values_N)), n_bootstrap
    )
    low, high = np.quantile(draws @ values_N / len(values_N), [0.025, 0.975])
    return float(low), float(high)


def ranked(table: pd.DataFrame, column: str, *, min_cells: int) -> pd.DataFrame:
    """A table ordered by a column, the largest first, with rows of fewer than `min_cells` cells last.

    For `label_shift_mean` the lowest are first: the genes whose loss makes a label least likely.
    """
    table = table.sort_values(column, ascending=column.startswith("label_shift"), kind="stable")
    return table.iloc[np.argsort(table["n_cells"].to_numpy() < min_cells, kind="stable")]


def rank_sum(record: ShiftRecord, measure: str, *, null: Null | None = None) -> pd.DataFrame:
    """Test the values of each row against a null with a two-sided rank-sum test.

    Parameters
    ----------
    record
        Values of all rows.
    measure
        The measure to test.
    null
        Rows whose values are the null; a row of the null is tested against its other rows. None to test each row against
        all other rows.

    Returns
    -------
    One row for each of `record.rows`:

    - `null`, a description of the null, and `null_mean`
    - `effect_size`, the rank-biserial correlation, from -1 (all values below those of the null) to 1
    - `p_value` of the rank-sum test
    - `fdr`, the false discovery rate (Benjamini-Hochberg) over the requested rows

    Notes
    -----
    The test is the normal approximation of `scipy.stats.mannwhitneyu`, corrected for ties and continuity. It is implemented
    here because each row is compared with the rest of the same pool, which is sorted once instead of once per row, and
    because `scipy.stats` takes half a second to import.
    """
    rows = record.rows
    values = {int(row): record.values(int(row), measure) for row in rows}
    null_rows = rows if null is None else np.intersect1d(rows, null.rows)
    pool = [values[int(row)] for row in null_rows]
    lines = _against_rest(pool)
    if null is not None:
        inside = dict(zip(null_rows.tolist(), lines))
        pooled = np.concatenate(pool) if pool else np.zeros(0)
        lines = [inside.get(int(row)) or _against(values[int(row)], pooled) for row in rows]
    table = pd.DataFrame(lines, columns=["null_mean", "effect_size", "p_value"], dtype=float)
    table.insert(0, "null", ALL_OTHERS if null is None else null.name)
    counted = table["p_value"] if null is None else table["p_value"].mask(np.isin(rows, null.only))
    table["fdr"] = false_discovery_rate(counted.to_numpy())
    return table


def false_discovery_rate(p_values_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the false discovery rate of each test (Benjamini and Hochberg 1995); NaN for NaN."""
    tested_R = ~np.isnan(p_values_R)
    order = np.argsort(p_values_R, kind="stable")[: tested_R.sum()]  # NaN is last
    scaled = p_values_R[order] * (len(order) / np.arange(1, len(order) + 1))
    fdr_R = np.full(len(p_values_R), np.nan)
    fdr_R[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return fdr_R


def average_ranks(values_N: NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """Return the rank of each value, from 1, and the sum of n^3 - n over the numbers n of equal values.

    Equal values get the mean of their ranks. If a value is NaN, all ranks are.
    """
    _, index_N, times = np.unique(values_N, return_inverse=True, return_counts=True)
    ranks_N = (np.cumsum(times) - (times - 1) / 2)[index_N]
    times = times.astype(np.float64)
    return np.where(np.isnan(values_N).any(), np.nan, ranks_N), float((times**3 - times).sum())


def _against(values_N: NDArray[np.float64], null: NDArray[np.float64]) -> tuple[float, float, float]:
    if not len(null):
        return np.nan, np.nan, np.nan
    ranks, ties = average_ranks(np.concatenate([values_N, null]))
    return float(null.mean()), *_rank_sum_test(ranks[: len(values_N)], len(null), ties)


def _against_rest(groups: list[NDArray[np.float64]]) -> list[tuple[float, float, float]]:
    """Compare each group with all others together; return (mean of the others, effect size, p-value)."""
    if len(groups) < 2:
        return [(np.nan, np.nan, np.nan)] * len(groups)
    pooled = np.concatenate(groups)
    ranks, ties = average_ranks(pooled)
    lines, start = [], 0
    for group in groups:
        n_out = len(pooled) - len(group)
        tested = _rank_sum_test(ranks[start : start + len(group)], n_out, ties)
        lines.append((float((pooled.sum() - group.sum()) / n_out), *tested))
        start += len(group)
    return lines


def _rank_sum_test(ranks: NDArray[np.float64], n_out: int, ties: float) -> tuple[float, float]:
    """Return effect size and p-value of values with these ranks among themselves and `n_out` others."""
    n_in = len(ranks)
    total = n_in + n_out
    u = ranks.sum() - n_in * (n_in + 1) / 2
    spread = np.sqrt(n_in * n_out / 12 * (total + 1 - ties / (total * (total - 1))))
    away = max(abs(u - n_in * n_out / 2) - 0.5, 0.0)
    p_value = 2 * special.ndtr(-away / spread) if spread > 0 else 1.0
    return float(2 * u / (n_in * n_out) - 1), float(min(p_value, 1.0))
