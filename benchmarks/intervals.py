"""Means with intervals, for the tables of benchmarks."""

import pandas as pd
from scipy import stats


def interval(values: pd.Series, form: str = "{:.3f}") -> str:
    """Mean and half width of its 95 % t interval; the mean alone for one value, and nothing without any."""
    if values.empty:
        return ""
    mean = form.format(values.mean())
    return mean if len(values) == 1 else f"{mean} ± {stats.sem(values) * stats.t.ppf(0.975, len(values) - 1):.3f}"
