"""Pooling of token states. Oracle: one cell at a time in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from scfm.nn import expression_weights, pool_cells

BOUNDS = [0, 3, 3, 8]


@pytest.mark.parametrize("values_T", [None, torch.tensor([2.0, 0, 5, 1, -1, 3, 0, 4])])
def test_a_weighted_mean_follows_expression(values_T):
    states_TD = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    keep_T = torch.tensor([False, *[True] * 7])
    position_T = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    weight_T = expression_weights(position_T, values_T)
    found = pool_cells(states_TD, torch.tensor(BOUNDS), keep_T, how="weighted", weight_T=weight_T)
    for cell, (start, stop) in enumerate(itertools.pairwise(BOUNDS)):
        if values_T is None:
            weights = 1 / (1 + np.arange(stop - start) / 50)
        else:
            weights = np.maximum(values_T[start:stop].numpy(), 0)
        weights = weights * keep_T[start:stop].numpy()
        expected = np.zeros(4) if stop == start else weights @ states_TD[start:stop].numpy() / weights.sum()
        np.testing.assert_allclose(found[cell].numpy(), expected, rtol=1e-5, atol=1e-7)


def test_a_cell_of_weights_zero_is_zero():
    pooled = pool_cells(torch.ones(2, 3), torch.tensor([0, 2]), how="weighted", weight_T=torch.zeros(2))
    assert pooled.tolist() == [[0.0, 0.0, 0.0]]
