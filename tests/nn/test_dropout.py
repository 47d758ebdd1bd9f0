"""Dropout by gaps is dropout: independent elements, exactly p, unbiased, and its backward pass is that of its forward pass."""

import numpy as np
import pytest
import torch
from scipy import stats

from scfm.nn.dropout import add_dropped, dropout, dropped_indices

N = 200_000


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_elements_are_dropped_independently_with_probability_p(p):
    """Oracles: the binomial distribution of the number dropped, and the geometric one of gaps, by chi-square."""
    torch.manual_seed(0)
    counts = np.array([len(dropped_indices(1000, p)) for _ in range(400)])
    assert abs(counts.mean() - 1000 * p) < 4 * np.sqrt(1000 * p * (1 - p) / 400)
    assert counts.var() == pytest.approx(1000 * p * (1 - p), rel=0.3)
    gaps = np.diff(dropped_indices(N, p).numpy())
    largest = max(2, int(stats.geom.ppf(0.999, p)))
    edges = np.unique(stats.geom.ppf(np.linspace(0, 1, 12)[1:-1], p).clip(1, largest))
    cdf = np.concatenate([[0], stats.geom.cdf(edges, p), [1]])
    seen = np.histogram(gaps, np.concatenate([[0.5], edges + 0.5, [np.inf]]))[0]
    kept = np.diff(cdf) > 0
    assert stats.chisquare(seen[kept], np.diff(cdf)[kept] * len(gaps)).pvalue > 1e-3


def test_every_place_is_as_likely_also_the_first_and_the_last():
    torch.manual_seed(0)
    hits = np.zeros(7)
    for _ in range(6000):
        np.add.at(hits, dropped_indices(7, 0.3).numpy(), 1)
    assert stats.chisquare(hits).pvalue > 1e-3
    assert abs(hits.mean() / 6000 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 42000)


def test_the_mean_stays_and_the_rest_is_scaled():
    torch.manual_seed(0)
    dropped = dropout(torch.ones(N), 0.1, training=True)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.9))}
    assert abs(float(dropped.mean()) - 1) < 4 * np.sqrt(0.1 / 0.9 / N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_mask(dtype):
    torch.manual_seed(0)
    residual = torch.randn(50, 8, requires_grad=True)
    update = torch.randn(50, 8).to(dtype).requires_grad_()
    added = add_dropped(residual, update, 0.3, training=True)
    mask = (added != residual).float()
    assert 0 < float(mask.mean()) < 1
    torch.testing.assert_close(added, residual + update.float() * mask / 0.7, rtol=1e-5, atol=1e-6)
    grad = torch.randn(50, 8)
    added.backward(grad)
    torch.testing.assert_close(residual.grad, grad)
    expected = grad * mask / 0.7
    torch.testing.assert_close(update.grad.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert update.grad.dtype == dtype


def test_the_seed_decides_and_nothing_is_drawn_where_nothing_is_dropped():
    update = torch.randn(100, 4)
    torch.manual_seed(3)
    one = dropout(update, 0.2, training=True)
    torch.manual_seed(3)
    assert torch.equal(dropout(update, 0.2, training=True), one)
    state = torch.get_rng_state()
    assert dropout(update, 0.2, training=False) is update
    assert dropout(update, 0.0, training=True) is update
    assert torch.equal(torch.get_rng_state(), state)


def test_a_view_that_is_not_contiguous_is_served():
    update = torch.randn(6, 40).T.requires_grad_()
    torch.manual_seed(0)
    dropout(update, 0.5, training=True).sum().backward()
    assert set(update.grad.unique().tolist()) == {0.0, 2.0}
