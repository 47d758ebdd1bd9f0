"""FAVOR+ on packed cells, compared with its formula and with the softmax that it estimates."""

# Axes: T packed tokens, H heads, K head width, M random features, N tokens of a cell.

import math
import sys
from itertools import pairwise

import accuracy
import pytest
import torch

from scfm import ops
from scfm.ops.linear_attention import in_chunks

HAS_KERNELS = ops.extension_info()["available"]
NEEDS_KERNELS = pytest.mark.skipif(not HAS_KERNELS, reason="needs the compiled extension")
BACKENDS = ["torch", pytest.param("fused", marks=NEEDS_KERNELS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around every block size of the kernels: 32 features, 64 or 128 tokens, 192 queries.
CASES = [
    ((0, 1, 7, 64, 65), 50, 16),
    ((193, 3), 33, 20),
    ((127, 129, 0), 32, 64),
    ((63, 300), 266, 64),
    ((257,), 65, 128),
    ((5,), 3, 1),
]


def draw(lengths, n_features, head_dim, dtype=torch.float32, *, n_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(lengths) + n_features)
    n_tokens = sum(lengths)
    tensors = [torch.randn(n_tokens, n_heads, head_dim, generator=generator).to(dtype) for _ in range(4)]
    projection_MK = ops.random_projection(n_features, head_dim, generator=generator)
    return *tensors, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), projection_MK


def by_the_formula(query_NK, key_NK, value_NK, projection_MK):
    """Choromanski et al. 2021 for one cell and head, as scBERT publishes it at batch size 1."""
    width, n_features = query_NK.shape[1], projection_MK.shape[0]

    def phi(x_NK, stabilizer):
        scaled = x_NK * width**-0.25
        exponent = scaled @ projection_MK.T - scaled.square().sum(1, keepdim=True) / 2 - stabilizer
        return (exponent.exp() + 1e-4) / math.sqrt(n_features)

    query = phi(query_NK, (query_NK * width**-0.25 @ projection_MK.T).amax(1, keepdim=True).detach())
    key = phi(key_NK, (key_NK * width**-0.25 @ projection_MK.T).max().detach())
    summary, weights = key.T @ value_NK, key.sum(0)
    return query @ summary / (query @ weights)[:, None]


def formula_on_packed(q, k, v, bounds, projection_MK):
    outs = [
        torch.stack([by_the_formula(q[a:b, h], k[a:b, h], v[a:b, h], projection_MK) for h in range(q.shape[1])], 1)
        for a, b in pairwise(bounds.tolist())
        if b > a
    ]
    return torch.cat(outs)


def results(function, tensors, bounds, projection_MK, dtype=None):
    """Output and gradients."""
    *qkv, grad_out = (tensor.to(dtype or tensor.dtype) for tensor in tensors)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in qkv]
    out = function(*leaves, bounds, projection_MK.to(dtype or projection_MK.dtype))
    out.backward(grad_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def fused(*arguments, **options):
    return ops.linear_attention(*arguments, backend="fused", **options)


def check_accuracy(lengths, n_features, head_dim, dtype):
    """The rule of `accuracy`. Where plain torch overflows, in float16, it is bfloat16's error in units of its own rounding."""
    in_range = torch.bfloat16 if dtype == torch.float16 else dtype
    kernel, plain = [], []
    for seed in range(4):
        *tensors, bounds, projection_MK = draw(lengths, n_features, head_dim, dtype, seed=seed)
        exact = results(formula_on_packed, tensors, bounds, projection_MK, torch.float64)
        kernel.append((results(fused, tensors, bounds, projection_MK), exact))
        *tensors, bounds, projection_MK = draw(lengths, n_features, head_dim, in_range, seed=seed)
        exact = results(formula_on_packed, tensors, bounds, projection_MK, torch.float64)
        plain.append((results(formula_on_packed, tensors, bounds, projection_MK, in_range), exact))
    units = torch.finfo(dtype).eps / torch.finfo(in_range).eps
    for number, name in enumerate(("out", "q", "k", "v")):
        (found, exact), (of_torch, its_exact) = (
            [[of_draw[part][number] for of_draw in draws] for part in range(2)] for draws in (kernel, plain)
        )
        assert found[0].dtype == dtype
        accuracy.check(found, exact, units * accuracy.root_mean_square_error(of_torch, its_exact), name)


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_of_fused_are_within_twice_those_of_torch(case, dtype):
    check_accuracy(*case, dtype)


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", accuracy.ISAS)
def test_every_instruction_set(isa):
    """In a separate process, with torch limited to the same instruction set."""
    accuracy.run_with(isa, __file__)


@pytest.mark.parametrize("lengths_k", [None, (0, 130, 9, 64, 200), (3, 0, 0, 1, 128)])
def test_chunks_of_a_gpu_give_what_cell_by_cell_gives(lengths_k):
    """The algorithm for GPUs, in float64 on the CPU, with all gradients."""
    lengths = (128, 0, 7, 300, 129)
    q, k, v, grad_out, cu_seqlens, projection = (
        t.double() if t.is_floating_point() else t for t in draw(lengths, 30, 16)
    )
    options = {}
    if lengths_k is not None:
        k, v = (torch.randn(sum(lengths_k), 2, 16, dtype=torch.float64) for _ in range(2))
        options = {"cu_seqlens_k": torch.tensor([0, *torch.tensor(lengths_k).cumsum(0).tolist()])}
    layout = ops.make_plan(cu_seqlens, **options).laid_out().layout
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    expected = ops.linear_attention(*leaves, cu_seqlens, projection, backend="torch", **options)
    found = in_chunks(*leaves, projection, layout)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(out, leaves, grad_out) for out in (found, expected))):
        torch.testing.assert_close(one, other)


def test_torch_follows_the_formula_in_float64():
    *tensors, bounds, projection_MK = draw((0, 7, 0, 1, 22), 50, 16)
    found, expected = (
        results(function, tensors, bounds, projection_MK, torch.float64)
        for function in (ops.linear_attention, formula_on_packed)
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_does_not_see_its_batch_mates(backend, dtype):
    lengths = (130, 0, 40, 300)
    q, k, v, grad_out, bounds, projection_MK = draw(lengths, 70, 32, dtype)
    q[:130], k[170:] = torch.nan, torch.inf  # the third cell has to come through between these

    def attend(*arguments):
        return ops.linear_attention(*arguments, backend=backend)

    together = results(attend, (q, k, v, grad_out), bounds, projection_MK)
    alone = results(attend, [t[130:170] for t in (q, k, v, grad_out)], torch.tensor([0, 40]), projection_MK)
    for one, other in zip(together, alone):
        assert torch.equal(one[130:170], other)


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_on_one_thread_or_two(dtype):
    *tensors, bounds, projection_MK = draw((300, 5, 200), 100, 32, dtype)
    found = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        found.append(results(fused, tensors, bounds, projection_MK))
    for one, other in zip(*found):
        assert torch.equal(one, other)


@NEEDS_KERNELS
def test_fused_reads_views_of_a_packed_projection_without_a_copy():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(90, 3, 2, 24, generator=generator)
    projection_MK, bounds = ops.random_projection(40, 24, generator=generator), torch.tensor([0, 30, 90])
    views, copies = qkv.unbind(1), [view.contiguous() for view in qkv.unbind(1)]
    assert torch.equal(fused(*views, bounds, projection_MK), fused(*copies, bounds, projection_MK))
    leaves = [copy.requires_grad_() for copy in copies]
    expanded, whole = (
        torch.autograd.grad(fused(*leaves, bounds, projection_MK), leaves, grad)
        for grad in (torch.ones(()).expand(90, 2, 24), torch.ones(90, 2, 24))
    )
    for one, other in zip(expanded, whole):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_their_own(backend):
    q, k, v, _, bounds, projection_MK = draw((30, 0, 200, 4), 40, 32)
    whole = ops.linear_attention(q, k, v, bounds, projection_MK, backend=backend)
    chosen_N = torch.tensor([0, 29, 100, 233])
    bounds_q = torch.tensor([0, 2, 2, 3, 4])
    found = ops.linear_attention(q[chosen_N], k, v, bounds_q, projection_MK, cu_seqlens_k=bounds, backend=backend)
    torch.testing.assert_close(found, whole[chosen_N])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_gives_zero_and_a_key_without_queries_gets_none(backend):
    q, k, v, _, _, projection_MK = draw((6,), 40, 32)
    q[0], k[1] = torch.nan, torch.inf  # of those that see nobody
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    bounds, bounds_k = torch.tensor([0, 2, 2, 6]), torch.tensor([0, 0, 3, 6])
    out = ops.linear_attention(*leaves, bounds, projection_MK, cu_seqlens_k=bounds_k, backend=backend)
    out.square().sum().backward()
    assert torch.equal(out[:2], torch.zeros(2, 2, 32))
    for leaf, n_idle in zip(leaves, (2, 3, 3)):
        assert torch.equal(leaf.grad[:n_idle], torch.zeros(n_idle, 2, 32))
        assert leaf.grad[n_idle:].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [(0, 0, 0), (0,)], ids=["empty cells", "no cells"])
def test_nothing_at_all_has_gradients_too(backend, bounds):
    leaves = [torch.zeros(0, 2, 8, requires_grad=True) for _ in range(3)]
    out = ops.linear_attention(*leaves, torch.tensor(bounds), torch.ones(4, 8), backend=backend)
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_features_estimate_softmax_attention(backend):
    q, k, v, _, bounds, _ = draw((7, 1, 22), 1, 16)
    q, k = q * 0.5, k * 0.5
    projection_MK = ops.random_projection(20_000, 16, generator=torch.Generator().manual_seed(1))
    estimate = ops.linear_attention(q, k, v, bounds, projection_MK, backend=backend)
    torch.testing.assert_close(estimate, ops.attention(q, k, v, bounds), rtol=0, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_queries_and_keys_do_not_overflow(backend):
    q, k, v, grad_out, bounds, projection_MK = draw((100,), 40, 32)
    found = results(
        lambda *arguments: ops.linear_attention(*arguments, backend=backend),
        (q * 30, k * 30, v, grad_out),
        bounds,
        projection_MK,
    )
    exact = results(formula_on_packed, (q * 30, k * 30, v, grad_out), bounds, projection_MK, torch.float64)
    for one, truth in zip(found, exact):
        torch.testing.assert_close(one.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_the_projection_can_be_trained_by_torch():
    q, k, v, _, bounds, projection_MK = draw((9,), 12, 8)
    projection_MK.requires_grad_()
    ops.linear_attention(q, k, v, bounds, projection_MK).sum().backward()
    assert projection_MK.grad.abs().sum() > 0
    if HAS_KERNELS:
        with pytest.raises(RuntimeError, match="no gradient of the projection"):
            fused(q, k, v, bounds, projection_MK)


@NEEDS_KERNELS
def test_a_second_derivative_is_an_error_with_kernels_and_right_in_torch():
    q, k, v, _, bounds, projection_MK = draw((9,), 12, 8)
    q.requires_grad_()
    for backend in ("fused", "torch"):
        out = ops.linear_attention(q, k, v, bounds, projection_MK, backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        if backend == "torch":
            assert torch.autograd.grad(grad.square().sum(), q)[0].abs().sum() > 0
        else:
            with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
                torch.autograd.grad(grad.square().sum(), q)


@NEEDS_KERNELS
def test_a_projection_elsewhere_does_not_reach_the_kernel():
    q, k, v, _, bounds, projection_MK = draw((9,), 12, 8)
    with pytest.raises(NotImplementedError, match="meta"):
        ops.linear_attention(q, k, v, bounds, projection_MK.to("meta"))
    doubled = ops.linear_attention(q, k, v, bounds, projection_MK.double())
    assert torch.equal(doubled, ops.linear_attention(q, k, v, bounds, projection_MK))


def test_autocast_sets_the_dtype():
    q, k, v, _, bounds, projection_MK = draw((40,), 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = [ops.linear_attention(q, k, v, bounds, projection_MK, backend=name) for name in ("auto", "torch")]
    expected = ops.linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bounds, projection_MK, backend="torch")
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[1], expected)  # its sums stay float32


@NEEDS_KERNELS
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    q, k, v, _, bounds, projection_MK = draw((9, 0, 40), 20, 16)
    arguments = (*(t.requires_grad_(grad) for t in (q, k, v)), bounds, None, projection_MK, 1e-4)
    torch.library.opcheck(torch.ops.scfm.linear_attention_forward.default, arguments)


@NEEDS_KERNELS
def test_a_compiled_call_has_one_graph_and_the_same_gradients():
    *tensors, bounds, projection_MK = draw((9, 0, 40), 20, 16)
    compiled = torch.compile(ops.linear_attention, fullgraph=True, backend="aot_eager")
    eager = results(ops.linear_attention, tensors, bounds, projection_MK)
    for one, other in zip(results(compiled, tensors, bounds, projection_MK), eager):
        assert torch.equal(one, other)


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


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(6, 2, 4), "`k` has shape"),
        (2, torch.zeros(6, 2, 8).double(), "differ in dtype"),
        (3, torch.tensor([0, 7]), "ends at 7"),
        (4, torch.tensor([0, 6]), "`cu_seqlens_k` must have as many"),
        (5, torch.zeros(5, 7), "`projection` must be contiguous float32"),
        (5, torch.zeros(0, 8), "`projection` must be contiguous float32"),
        (5, torch.zeros(5, 8).double(), "`projection` must be contiguous float32"),
    ],
)
def test_the_operator_itself_refuses_what_would_read_out_of_bounds(position, value, message):
    tokens = torch.zeros(6, 2, 8)
    call = [tokens, tokens, tokens, torch.tensor([0, 2, 6]), None, torch.zeros(5, 8), 1e-4]
    call[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.scfm.linear_attention_forward(*call)


if __name__ == "__main__":
    for dtype in DTYPES:
        for case in CASES:
            check_accuracy(*case, dtype)
    sys.stdout.write(ops.extension_info()["isa"])
