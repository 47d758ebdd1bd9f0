"""Attention probabilities and deletion effects, compared with whole matrices."""

# Axes: T packed tokens, H heads, K head width, N tokens of a cell, P pairs.

import pytest
import torch

from scfm import ops

HAS_KERNELS = ops.extension_info()["available"]
BACKENDS = ["torch", pytest.param("fused", marks=pytest.mark.skipif(not HAS_KERNELS, reason="needs the extension"))]
OPTIONS = {
    "plain": {},
    "generative": {"known": [0, 1, 70, 33], "bias": "head"},
    "cross": {"lengths_k": [2, 0, 40, 129], "bias": "key"},
}


def probabilities(problem):
    """Every probability, (Tq, Tk, H), float64: the output of attention on one-hot values."""
    n_keys = problem.k.shape[0]
    double = {"q": problem.q.double(), "k": problem.k.double()}
    columns = []
    for head in range(problem.q.shape[1]):
        rows = []
        for key in range(n_keys):
            one_hot = torch.zeros(n_keys, problem.q.shape[1], problem.q.shape[2], dtype=torch.float64)
            one_hot[key, head, 0] = 1.0
            rows.append(
                ops.attention(double["q"], double["k"], one_hot, problem.cu_seqlens, **problem.options)[:, head, 0]
            )
        columns.append(torch.stack(rows, 1))
    return torch.stack(columns, -1)


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def problem(request, make_problem):
    return make_problem([1, 3, 100, 66], head_dim=16, **request.param)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_column_sums_and_head_means(problem, backend):
    probs = probabilities(problem).float()
    call = (problem.q, problem.k, problem.cu_seqlens)
    sums = ops.attention_scores(*call, **problem.options, backend=backend)
    torch.testing.assert_close(sums, probs.sum(0), rtol=1e-5, atol=1e-5)
    mean = ops.attention_scores(*call, head_mean=True, **problem.options, backend=backend)
    torch.testing.assert_close(mean, sums.mean(-1))
    pairs = torch.cartesian_prod(torch.arange(problem.q.shape[0]), torch.arange(problem.k.shape[0]))
    found = ops.attention_scores(*call, pairs=pairs, **problem.options, backend=backend)
    torch.testing.assert_close(found, probs.flatten(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deletion_effect_is_what_deleting_does(problem, backend):
    """Remove each key by a bias of -inf, run again, and leave out its own query."""
    if "n_known" in problem.options:
        # The own key of a target token cannot be hidden from its query alone, and no other query attends to it.
        deleted = [c + i for c, n in zip(problem.cu_seqlens, problem.options["n_known"]) for i in range(n)]
    else:
        deleted = range(problem.k.shape[0])
    found = ops.deletion_effects(
        problem.q, problem.k, problem.v, problem.cu_seqlens, problem.grad_out, **problem.options, backend=backend
    )
    expected = torch.zeros(found.shape, dtype=torch.float64)
    options = dict(problem.options)
    bias = options.pop("key_bias", torch.zeros(problem.k.shape[0])).double()
    call = (problem.q.double(), problem.k.double(), problem.v.double(), problem.cu_seqlens)
    before = ops.attention(*call, key_bias=bias, **options)
    for key in deleted:
        without = bias.clone()
        without[key] = -torch.inf
        moved = (ops.attention(*call, key_bias=without, **options) - before) * problem.grad_out
        if "cu_seqlens_k" not in options:
            moved[key] = 0.0
        expected[key] = moved.sum((0, 2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_pairs_out_of_range_are_an_error():
    q = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="holds query 0 and key 4, but there are 4 queries and 4 keys"):
        ops.attention_scores(q, q, torch.tensor([0, 4]), pairs=torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match=r"must hold integer \(query, key\) rows"):
        ops.attention_scores(q, q, torch.tensor([0, 4]), pairs=torch.zeros(2, 2))


def test_a_gradient_of_another_shape_is_an_error():
    q = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match=r"`grad_out` is torch\.float32 of shape"):
        ops.deletion_effects(q, q, q, torch.tensor([0, 4]), q[:3])
