"""Held-out cells: stratified by label, and with whole groups (donors, batches) kept together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out, each ascending, int64; together every row once."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


def split_cells(
    n_obs: int | None = None,
    *,
    labels: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Split:
    """Split cells into training and held-out rows; the same seed always gives the same split.

    Parameters
    ----------
    n_obs
        Number of cells; needed only where neither `labels` nor `groups` is given.
    labels
        Class of each cell, shape (n_obs,). Every class keeps its share in both parts, and at least one cell in
        training; a class of two or more has at least one held out. Missing labels (NaN, None, -1) are a class of
        their own.
    groups
        Group of each cell, shape (n_obs,); no group is in both parts. With `labels`, groups are chosen greedily so that
        the shares of classes come out as near as whole groups allow.
    test_fraction
        Share of cells to hold out, between 0 and 1.
    seed
        Seed of the shuffle.

    Raises
    ------
    ValueError
        If nothing says how many cells there are, the fraction is not inside (0, 1), or there is one group only.

    Examples
    --------
    >>> from scfm.data import split_cells
    >>> split = split_cells(labels=["B"] * 10 + ["T"] * 10, test_fraction=0.2, seed=0)
    >>> len(split.train), len(split.test)
    (16, 4)
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"`test_fraction` is {test_fraction}; it must lie between 0 and 1.")
    class_B, group_B = _codes(labels), _codes(groups)
    sizes = {len(codes) for codes in (class_B, group_B) if codes is not None}
    sizes |= set() if n_obs is None else {n_obs}
    if len(sizes) != 1:
        raise ValueError(f"The numbers of cells do not agree or are not given: {sorted(sizes)}.")
    n_cells = sizes.pop()
    class_B = np.zeros(n_cells, dtype=np.int64) if class_B is None else class_B
    rng = np.random.default_rng(seed)
    held_B = (
        _hold_out_cells(class_B, test_fraction, rng)
        if group_B is None
        else _hold_out_groups(class_B, group_B, test_fraction, rng)
    )
    return Split(train=np.flatnonzero(~held_B), test=np.flatnonzero(held_B))


def _codes(values: ArrayLike | None) -> NDArray[np.int64] | None:
    return None if values is None else pd.factorize(pd.Series(values), sort=True)[0].astype(np.int64)


def _hold_out_cells(class_B: NDArray[np.int64], fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    held_B = np.zeros(len(class_B), dtype=bool)
    for label in np.unique(class_B):
        members = rng.permutation(np.flatnonzero(class_B == label))
        n_held = round(len(members) * fraction)
        n_held = min(max(n_held, 1), len(members) - 1) if len(members) > 1 else 0
        held_B[members[:n_held]] = True
    return held_B


def _hold_out_groups(
    class_B: NDArray[np.int64], group_B: NDArray[np.int64], fraction: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    groups, group_B = np.unique(group_B, return_inverse=True)
    if len(groups) < 2:
        raise ValueError("There is one group only, so none can be held out. Give a finer `groups`, or none.")
    classes, class_B = np.unique(class_B, return_inverse=True)
    table = np.zeros((len(groups), len(classes)))
    np.add.at(table, (group_B, class_B), 1)
    wanted = table.sum(axis=0) * fraction
    held: list[int] = []
    # Each step takes the group that brings the held-out counts nearest to the wanted ones, until none does.
    remaining = list(rng.permutation(len(groups)))
    while len(remaining) > 1:
        gap = wanted - table[held].sum(axis=0)
        distances = [np.abs(gap - table[group]).sum() for group in remaining]
        best = int(np.argmin(distances))
        if held and distances[best] >= np.abs(gap).sum():
            break
        held.append(remaining.pop(best))
    return np.isin(group_B, held)
