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


def effects_by_removal(q, k, v, grad_out, lengths, lengths_k, bias):
    """Effect of each key, (Tk, H), float64: softmax over the remaining keys, once per key; the key's own query is left out."""
    effects, first, first_k = [], 0, 0
    for n, n_keys in zip(lengths, lengths_k or lengths):
        query, grad = (t[first : first + n].double().transpose(0, 1) for t in (q, grad_out))
        key, value = (t[first_k : first_k + n_keys].double().transpose(0, 1) for t in (k, v))
        scores = query @ key.mT * q.shape[2] ** -0.5 + bias[first_k : first_k + n_keys].double()
        before = scores.softmax(-1) @ value
        for deleted in range(n_keys):
            kept = torch.arange(n_keys) != deleted
            after = scores[..., kept].softmax(-1) @ value[:, kept] if n_keys > 1 else torch.zeros_like(before)
            moved = (grad * (after - before)).sum(-1)
            if lengths_k is None:
                moved[:, deleted] = 0.0
            effects.append(moved.sum(-1))
        first, first_k = first + n, first_k + n_keys
    return torch.stack(effects)


SHARP = {
    "one key": ([1] * 300, [1] * 300, 4.0, 0.0),
    "cells of 20": ([20] * 15, None, 4.0, 0.0),
    "some queries": ([70, 3], None, 2.0, 0.0),
    "large scores": ([20] * 8, None, 12.0, 0.0),
    "one key far above": ([5, 40], None, 1.0, 300.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lengths", "lengths_k", "factor", "peak"), SHARP.values(), ids=SHARP.keys())
def test_effects_of_keys_with_almost_all_attention(make_problem, lengths, lengths_k, factor, peak, dtype, backend):
    problem = make_problem(lengths, head_dim=64, dtype=dtype, **({"lengths_k": lengths_k} if lengths_k else {}))
    q, k = factor * problem.q, factor * problem.k
    bias = torch.zeros(k.shape[0])
    bias[::7] = peak
    found = ops.deletion_effects(
        q, k, problem.v, problem.cu_seqlens, problem.grad_out, key_bias=bias, **problem.options, backend=backend
    )
    expected = effects_by_removal(q, k, problem.v, problem.grad_out, lengths, lengths_k, bias)
    # A probability has the relative error of a few roundings of its score and its log-sum-exp.
    tolerance = 8 * torch.finfo(torch.float32).eps * max(30.0, factor**2 * 8 * 4 + peak)
    assert ((found - expected).abs() / (1 + expected.abs())).max() <= tolerance
