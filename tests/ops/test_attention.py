"""Attention against the float64 oracle, on both backends, for every option and dtype."""

# Axes: T packed tokens, H heads, K head width.

import sys

import accuracy
import oracle
import pytest
import torch
from problems import Problem

from scfm import ops

HAS_KERNELS = ops.extension_info()["available"]
BACKENDS = ["torch", pytest.param("fused", marks=pytest.mark.skipif(not HAS_KERNELS, reason="needs the extension"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = [20, 300, 64, 65, 129, 511]
OPTIONS = {
    "plain": {},
    "generative": {"known": [13, 150, 64, 12, 128, 257]},
    "key bias": {"bias": "key"},
    "head bias, generative": {"bias": "head", "known": [20, 299, 63, 65, 33, 32]},
    "cross": {"lengths_k": [25, 257, 33, 11, 64, 31], "bias": "head"},
    "negative scale": {"scale": -0.3},
}


def largest_error(found, expected):
    return accuracy.error(found, expected).abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_errors_stay_within_twice_those_of_plain_torch(make_problem, options, dtype, backend):
    problems = [make_problem(RAGGED, dtype=dtype, seed=seed, **options) for seed in accuracy.SEEDS]
    accuracy.check_attention(problems, ops.attention, return_lse=True, backend=backend)


PARTS = {
    "plain": {"lengths_k": [2500, 3600, 2049, 2048]},
    "bias": {"lengths_k": [2305, 0, 2049, 3457], "bias": "head"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS.keys())
def test_keys_of_long_cells_are_divided_among_tasks(make_problem, options, dtype, backend):
    problems = [make_problem([70, 9, 1, 0], head_dim=16, dtype=dtype, seed=seed, **options) for seed in accuracy.SEEDS]
    accuracy.check_attention(problems, ops.attention, return_lse=True, backend=backend)


# The grid of flash-attention's own tests: head widths, and cells with unequal numbers of queries and keys.
GRID_WIDTHS = [32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256]
GRID = [
    (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
    (2048, 2048),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not HAS_KERNELS, reason="needs the extension")
@pytest.mark.parametrize("isa", accuracy.ISAS)
def test_the_rule_holds_on_the_grid_of_flash_attention_with_every_instruction_set(isa):
    """In a separate process, with torch limited to the same instruction set."""
    accuracy.run_with(isa, __file__)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"known": [0, 0, 2, 3, 64, 1]},
        {"bias": "head", "known": [0, 1, 0, 5, 0, 64]},
        {"lengths_k": [3, 0, 1, 2, 9, 1]},
    ],
    ids=["plain", "generative", "bias", "cross"],
)
def test_cells_of_no_or_one_token_and_queries_of_no_or_one_key(make_problem, options, dtype, backend):
    """With one key plain torch is exact, so the rule above does not apply; a bound on rounding does."""
    problem = make_problem([0, 1, 2, 5, 64, 65], dtype=dtype, **options)
    expected = problem.run(oracle.attention, torch.float64)
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    for name, value in expected.items():
        largest = max(1.0, value.masked_fill(value.isinf(), 0.0).abs().max().item())
        assert largest_error(found[name], value) <= 24 * torch.finfo(dtype).eps * largest, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 32, 48, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_head_width(make_problem, head_dim, dtype, backend):
    problem = make_problem([70, 3], head_dim=head_dim, dtype=dtype, known=[40, 3], bias="key")
    expected = problem.run(oracle.attention, torch.float64)
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    # The scale of a gradient grows with the square root of the width; 40 bounds every value met here.
    tolerance = 40 * torch.finfo(dtype).eps
    for name, value in expected.items():
        assert largest_error(found[name], value) <= tolerance * max(1.0, value.abs().max().item()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 127, 128, 129, 255, 256, 257, 1023, 1025])
def test_one_more_or_less_than_a_block(make_problem, length, backend):
    problem = make_problem([length], n_heads=1, head_dim=32)
    expected = problem.run(oracle.attention, torch.float64)
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    for name, value in expected.items():
        assert largest_error(found[name], value) <= 1e-5 * max(1.0, value.abs().max().item()), name


def test_gradients_of_the_torch_backend_are_exact(make_problem):
    problem = make_problem([4, 0, 3], n_heads=1, head_dim=3, dtype=torch.float64, known=[2, 0, 0], bias="key")

    def function(q, k, v, key_bias):
        options = {"n_known": problem.options["n_known"], "key_bias": key_bias, "backend": "torch"}
        return ops.attention(q, k, v, problem.cu_seqlens, **options, return_lse=True)

    leaves = [problem.q, problem.k, problem.v, problem.options["key_bias"].double()]
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_attends_to_no_key_gives_zero(make_problem, dtype, backend):
    hidden = make_problem([20, 30], dtype=dtype, bias="key")
    hidden.options["key_bias"][:20] = -torch.inf
    found = hidden.run(ops.attention, return_lse=True, backend=backend)
    assert (found["lse"][:20] == -torch.inf).all()
    for name in ("out", "q", "k", "v", "key_bias"):
        assert (found[name][:20] == 0).all(), name
        assert (found[name][20:] != 0).any(), name

    keyless = make_problem([20, 30], lengths_k=[0, 5], dtype=dtype)
    found = keyless.run(ops.attention, return_lse=True, backend=backend)
    assert (found["out"][:20] == 0).all()
    assert (found["q"][:20] == 0).all()
    assert (found["lse"][:20] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_without_queries_get_zero_gradients(make_problem, backend):
    problem = make_problem([0, 4], lengths_k=[40, 5], bias="head")
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    for name in ("k", "v", "key_bias"):
        assert (found[name][:40] == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_key_gets_exactly_zero_gradients(make_problem, backend):
    problem = make_problem([50], bias="key")
    problem.options["key_bias"][[3, 49]] = -torch.inf
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    for name in ("k", "v", "key_bias"):
        assert (found[name][[3, 49]] == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_target_token_attends_to_itself(make_problem, backend):
    problem = make_problem([1, 40], known=[0, 0])
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    torch.testing.assert_close(found["out"], problem.v)
    torch.testing.assert_close(found["v"], problem.grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_a_number_stays_in_its_cell(make_problem, dtype, backend):
    """Padding of a block is zero, not only masked: 0 times the NaN of another cell would be NaN."""
    problem = make_problem([33, 40], dtype=dtype)
    clean = problem.run(ops.attention, return_lse=True, backend=backend)
    for tensor in (problem.q, problem.k, problem.v, problem.grad_out):
        tensor[33:] = torch.nan
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    for name, value in clean.items():
        assert torch.equal(found[name][:33], value[:33]), name
        assert found[name][33:].isnan().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_packed_projection_are_read_without_a_copy(make_problem, backend):
    qkv = torch.randn(90, 3, 2, 64)
    cu_seqlens = torch.tensor([0, 50, 90])
    expected = ops.attention(*(part.contiguous() for part in qkv.unbind(1)), cu_seqlens, backend=backend)
    assert torch.equal(ops.attention(*qkv.unbind(1), cu_seqlens, backend=backend), expected)
    scattered = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in qkv.unbind(1)]
    torch.testing.assert_close(ops.attention(*scattered, cu_seqlens, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients_of_scores_do_not_overflow(make_problem, backend):
    """dS of 1e5 is beyond float16, the gradients are not: sums and scores are float."""
    problem = make_problem([2], n_heads=1, head_dim=16, dtype=torch.float16)
    problem.grad_out.fill_(100.0)
    problem.grad_lse.zero_()
    problem.v.copy_(torch.stack([torch.full((1, 16), 300.0), torch.full((1, 16), -300.0)]))
    problem.q.fill_(0.01)
    problem.k.fill_(0.01)
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    expected = problem.run(oracle.attention, torch.float64)
    assert expected["k"].abs().max() > 500
    torch.testing.assert_close(found["k"].double(), expected["k"], rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_natural_logarithm_and_scale_once(backend):
    q = torch.full((2, 1, 4), 2.0)
    _, lse = ops.attention(q, q, q, torch.tensor([0, 2]), scale=0.25, return_lse=True, backend=backend)
    # Both scores are 16 / 4 = 4.
    torch.testing.assert_close(lse, torch.full((2, 1), 4.0 + torch.tensor(2.0).log().item()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend):
    q = torch.zeros(0, 2, 8, requires_grad=True)
    for cu_seqlens in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        out = ops.attention(q, q, q, cu_seqlens, backend=backend)
        assert out.shape == (0, 2, 8)
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [3.0, 40.0, -40.0, 300.0], ids=lambda step: f"step {step:g}")
def test_scores_that_grow_or_fall_from_block_to_block(make_problem, step, dtype, backend):
    """The reference of the softmax is renewed when later scores exceed it by far, even where exp overflows."""
    problem = make_problem([1100], n_heads=1, head_dim=32, dtype=dtype, bias="key")
    problem.options["key_bias"] += step * (torch.arange(1100) // 64)
    expected = problem.run(oracle.attention, torch.float64)
    found = problem.run(ops.attention, return_lse=True, backend=backend)
    # A probability is known no better than its exponent, which has the digits of a float.
    exponent = 4 * torch.finfo(torch.float32).eps * problem.options["key_bias"].abs().max().item()
    tolerance = (8 if dtype == torch.bfloat16 else 16) * torch.finfo(dtype).eps + exponent
    for name, value in expected.items():
        assert largest_error(found[name], value) <= tolerance * max(1.0, value.abs().max().item()), name


def test_a_plan_gives_the_same_as_none(make_problem):
    problem = make_problem([30, 7], known=[10, 7])
    plan = ops.make_plan(problem.cu_seqlens, n_known=problem.options["n_known"])
    call = (problem.q, problem.k, problem.v, problem.cu_seqlens)
    assert torch.equal(ops.attention(*call, **problem.options, plan=plan), ops.attention(*call, **problem.options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does(make_problem, dtype, backend):
    problem = make_problem([30])
    with torch.autocast("cpu", dtype=dtype):
        out = ops.attention(problem.q, problem.k, problem.v, problem.cu_seqlens, backend=backend)
    assert out.dtype == dtype
    low = (tensor.to(dtype) for tensor in (problem.q, problem.k, problem.v))
    assert torch.equal(out, ops.attention(*low, problem.cu_seqlens, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_arithmetic_of_every_operator_as_it_is(make_problem, backend):
    """Only the dtype of what comes in changes; products inside are not rounded to it."""
    problem = make_problem([30, 65], known=[10, 40], bias="head", dtype=torch.bfloat16)
    calls = {
        "attention": lambda: tuple(problem.run(ops.attention, return_lse=True, backend=backend).values()),
        "columns": lambda: ops.attention_scores(
            problem.q, problem.k, problem.cu_seqlens, **problem.options, backend=backend
        ),
        "effects": lambda: ops.deletion_effects(
            problem.q, problem.k, problem.v, problem.cu_seqlens, problem.grad_out, **problem.options, backend=backend
        ),
    }
    for name, call in calls.items():
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call()
        for one, other in zip(found, expected):
            assert torch.equal(one, other), name


def main():
    for dtype in DTYPES:
        for options in OPTIONS.values():
            problems = [Problem(RAGGED, dtype=dtype, seed=seed, **options) for seed in accuracy.SEEDS]
            accuracy.check_attention(problems, ops.attention, return_lse=True, backend="fused")
        for head_dim in GRID_WIDTHS:
            for n_queries, n_keys in GRID:
                if dtype != torch.float32 and n_queries >= 1000:
                    continue  # plain torch takes minutes
                seeds = accuracy.SEEDS if n_queries < 256 else [0]
                problems = [
                    Problem([n_queries], lengths_k=[n_keys], n_heads=1, head_dim=head_dim, dtype=dtype, seed=seed)
                    for seed in seeds
                ]
                accuracy.check_attention(problems, ops.attention, return_lse=True, backend="fused")
    sys.stdout.write(ops.extension_info()["isa"])


if __name__ == "__main__":
    main()
