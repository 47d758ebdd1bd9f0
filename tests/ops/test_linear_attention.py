"""FAVOR+ on packed cells: against its formula written out, and against the softmax that it estimates."""

# Axes: T packed tokens, H heads, K head width, M random features.

import math

import pytest
import torch

from scfm import ops

N_FEATURES = 50
BOUNDS = torch.tensor([0, 7, 7, 8, 30])


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 30, 2, 16, generator=generator, dtype=torch.float64)
    return q, k, v, ops.random_projection(N_FEATURES, 16, generator=generator).double()


def by_the_formula(query_NK, key_NK, value_NK, projection):
    """Choromanski et al. 2021 for one cell and head, as scBERT publishes it at batch size 1."""
    width = query_NK.shape[1]

    def phi(x_NK, stabiliser):
        scaled = x_NK * width**-0.25
        exponent = scaled @ projection.T - scaled.square().sum(1, keepdim=True) / 2 - stabiliser
        return (exponent.exp() + 1e-4) / math.sqrt(N_FEATURES)

    query = phi(query_NK, (query_NK * width**-0.25 @ projection.T).amax(1, keepdim=True).detach())
    key = phi(key_NK, (key_NK * width**-0.25 @ projection.T).max().detach())
    weights = query @ key.T
    return weights @ value_NK / weights.sum(1, keepdim=True)


def test_each_cell_and_head_follows_the_formula(tensors):
    q, k, v, projection = tensors
    found = ops.linear_attention(q, k, v, BOUNDS, projection)
    for begin, end in ((0, 7), (7, 8), (8, 30)):
        for head in range(2):
            cell = (tensor[begin:end, head] for tensor in (q, k, v))
            torch.testing.assert_close(found[begin:end, head], by_the_formula(*cell, projection))


def test_a_cell_does_not_see_its_batch_mates(tensors):
    q, k, v, projection = (tensor.float() for tensor in tensors)
    together = ops.linear_attention(q, k, v, BOUNDS, projection)
    alone = ops.linear_attention(q[8:], k[8:], v[8:], torch.tensor([0, 22]), projection)
    assert torch.equal(together[8:], alone)


def test_many_features_estimate_softmax_attention(tensors):
    q, k, v, _ = tensors
    q, k = q * 0.5, k * 0.5
    projection = ops.random_projection(20_000, 16, generator=torch.Generator().manual_seed(1)).double()
    estimate = ops.linear_attention(q, k, v, BOUNDS, projection)
    torch.testing.assert_close(estimate, ops.attention(q, k, v, BOUNDS), rtol=0, atol=0.05)


def test_gradients_are_those_of_the_formula(tensors):
    q, k, v, projection = tensors
    results = []
    for function in (
        lambda *qkv: ops.linear_attention(*qkv, torch.tensor([0, 22]), projection),
        lambda *qkv: torch.stack([by_the_formula(*(t[:, h] for t in qkv), projection) for h in range(2)], 1),
    ):
        leaves = [tensor[8:].clone().requires_grad_() for tensor in (q, k, v)]
        function(*leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_rows_of_a_projection_block_are_orthogonal():
    projection = ops.random_projection(40, 16, generator=torch.Generator().manual_seed(0))
    for begin in (0, 16, 32):
        block = projection[begin : begin + 16]
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-4)
    # Norms are chi-distributed with 16 degrees of freedom: mean 3.94.
    assert abs(ops.random_projection(4000, 16).norm(dim=1).mean().item() - 3.94) < 0.1


def test_the_projection_must_fit():
    q = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match=r"`projection` has shape \(5, 4\); it must be \(features, 8\)"):
        ops.linear_attention(q, q, q, torch.tensor([0, 4]), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="`n_features` is 0"):
        ops.random_projection(0, 8)
