"""Means with intervals, for the tables of benchmarks."""

import numpy as np
import pandas as pd
from scipy import stats


def interval(values: pd.Series) -> str:
    """Mean and half width of a 95 % t interval."""
    half = stats.t.ppf(0.975, max(len(values) - 1, 1)) * values.std() / np.sqrt(len(values))
    return f"{values.mean():.3f} ± {half:.3f}"
