"""Statistics of shifts: confidence intervals, tests and effect sizes against a null."""

# Axes: R rows (perturbations), N values of one row.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

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
    here because each row is compared with the rest of the same pool, which is sorted once instead of once per row.
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
    tested = table["p_value"].notna().to_numpy()
    if null is not None:
        tested &= ~np.isin(rows, null.only)
    table["fdr"] = np.nan
    if tested.any():
        table.loc[tested, "fdr"] = stats.false_discovery_control(table.loc[tested, "p_value"].to_numpy())
    return table


def _against(values_N: NDArray[np.float64], null: NDArray[np.float64]) -> tuple[float, float, float]:
    if not len(null):
        return np.nan, np.nan, np.nan
    result = stats.mannwhitneyu(values_N, null, method="asymptotic")
    return float(null.mean()), float(2 * result.statistic / (len(values_N) * len(null)) - 1), float(result.pvalue)


def _against_rest(groups: list[NDArray[np.float64]]) -> list[tuple[float, float, float]]:
    """Compare each group with all others together; return (mean of the others, effect size, p-value)."""
    if len(groups) < 2:
        return [(np.nan, np.nan, np.nan)] * len(groups)
    pooled = np.concatenate(groups)
    ranks, total = stats.rankdata(pooled), len(pooled)
    ties = np.unique(pooled, return_counts=True)[1].astype(np.float64)
    tie_term = (ties**3 - ties).sum() / (total * (total - 1))
    lines, start = [], 0
    for group in groups:
        n_in, n_out = len(group), total - len(group)
        u = ranks[start : start + n_in].sum() - n_in * (n_in + 1) / 2
        spread = np.sqrt(n_in * n_out / 12 * (total + 1 - tie_term))
        away = max(abs(u - n_in * n_out / 2) - 0.5, 0.0)
        p_value = 2 * stats.norm.sf(away / spread) if spread > 0 else 1.0
        null_mean = (pooled.sum() - group.sum()) / n_out
        lines.append((float(null_mean), float(2 * u / (n_in * n_out) - 1), float(min(p_value, 1.0))))
        start += n_in
    return lines
