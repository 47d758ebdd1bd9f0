"""Attention by torch's flash kernels, which are replaced here by functions with the same conventions.

The stand-ins know what those kernels know and no more: cells by boundaries, no masks, a backward that takes the given output
and log-sum-exp as they are, and nonsense for queries without keys.
"""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width.

from itertools import pairwise

import oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scfm.ops import flash
from scfm.ops.options import OperatorOptions, check_key_bias
from scfm.ops.reference import attention as reference
from scfm.ops.reference import keys as reference_keys


def cells(q, k, layout):
    for (q0, q1), (k0, k1) in zip(pairwise(layout.cu_q.tolist()), pairwise(layout.cu_k.tolist())):
        assert q1 - q0 <= layout.longest_q
        assert k1 - k0 <= layout.longest_k
        yield slice(q0, q1), slice(k0, k1), torch.einsum("qhd,khd->hqk", q[q0:q1].float(), k[k0:k1].float())


def stand_in_forward(q, k, v, layout, scale):
    assert k.shape[0] == layout.cu_k[-1]
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], q.shape[0]), torch.inf)
    for queries, keys, scores in cells(q, k, layout):
        if keys.start == keys.stop:
            continue
        probs = torch.softmax(scores * scale, -1)
        out[queries] = torch.einsum("hqk,khd->qhd", probs, v[keys].float()).to(q.dtype)
        lse[:, queries] = torch.logsumexp(scores * scale, -1)
    return out, lse


def stand_in_backward(grad_out, q, k, v, out, lse, layout, scale):
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    grads = [torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)]
    delta = (grad_out.float() * out.float()).sum(-1)
    for queries, keys, scores in cells(q, k, layout):
        if keys.start == keys.stop or queries.start == queries.stop:
            continue
        probs = torch.exp(scores * scale - lse[:, queries, None])
        grad = grad_out[queries].float()
        grad_scores = (
            probs * (torch.einsum("qhd,khd->hqk", grad, v[keys].float()) - delta[queries].T[..., None]) * scale
        )
        grads[0][queries] = torch.einsum("hqk,khd->qhd", grad_scores, k[keys].float()).to(q.dtype)
        grads[1][keys] = torch.einsum("hqk,qhd->khd", grad_scores, q[queries].float()).to(q.dtype)
        grads[2][keys] = torch.einsum("hqk,qhd->khd", probs, grad).to(q.dtype)
    return tuple(grads)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(flash, "flash_forward", stand_in_forward)
    monkeypatch.setattr(flash, "flash_backward", stand_in_backward)
    monkeypatch.setattr(flash, "_TRUSTED", {})


def attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, n_known=None, key_bias=None, scale=None):
    bias_TH = None if key_bias is None else check_key_bias(key_bias, k)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return torch.ops.scfm.flash_attention_forward(q, k, v, cu_seqlens, cu_seqlens_k, n_known, bias_TH, scale)


def plain_torch(q, k, v, cu_seqlens, **options):
    return oracle.attention(q, k, v, cu_seqlens, **options)


OPTIONS = {
    "plain": {},
    "generative": {"known": [13, 0, 64, 12, 0]},
    "all known": {"known": [20, 90, 64, 65, 1]},
    "none known": {"known": [0, 0, 0, 0, 0]},
    "cross": {"lengths_k": [25, 0, 33, 11, 64]},
    "scale": {"known": [13, 0, 64, 12, 0], "scale": 0.3},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_outputs_and_all_gradients(make_problem, kernels, options, dtype):
    """With gradients of the output and of the log-sum-exp, by the accuracy rule of the fused kernels."""
    problem = make_problem([20, 90, 64, 65, 1], head_dim=32, dtype=dtype, **options)
    expected = problem.run(oracle.attention, torch.float64)
    plain = problem.run(plain_torch, dtype)
    found = problem.run(attention)
    assert all(flash._TRUSTED.values())
    assert list(flash._TRUSTED) == [(torch.device("cpu"), dtype, 32)]
    for name, value in expected.items():
        assert torch.equal(found[name].isinf(), value.isinf()), name
        hidden = value.isinf()
        largest = value.masked_fill(hidden, 0.0).abs().max().item()
        error = (found[name].double() - value).masked_fill(hidden, 0.0).abs().max().item()
        allowed = (plain[name].double() - value).masked_fill(hidden, 0.0).abs().max().item()
        factor = 2.0 if name in ("out", "lse") else 3.0
        assert error <= max(factor * allowed, 3 * torch.finfo(dtype).eps * largest), name


def test_no_query_and_no_key(make_problem, kernels):
    problem = make_problem([0, 3], lengths_k=[4, 0], head_dim=32, dtype=torch.bfloat16)
    found = problem.run(attention)
    assert (found["out"] == 0).all()
    assert (found["lse"] == -torch.inf).all()
    for name in "qkv":
        assert (found[name] == 0).all(), name


def test_a_key_bias_goes_to_plain_torch(make_problem, kernels):
    problem = make_problem([9, 30], head_dim=32, dtype=torch.bfloat16, bias="head", known=[3, 30])
    expected = problem.run(oracle.attention, torch.float64)
    for name, value in problem.run(attention).items():
        assert (found := value.double()).shape == expected[name].shape
        assert (found - expected[name]).abs().max() <= 0.02 * max(1.0, expected[name].abs().max()), name


def test_opcheck(make_problem, kernels):
    problem = make_problem([9, 0, 20], head_dim=32, dtype=torch.bfloat16, known=[3, 0, 20])
    leaves = [tensor.requires_grad_() for tensor in (problem.q, problem.k, problem.v)]
    arguments = (*leaves, problem.cu_seqlens, None, problem.options["n_known"], None, 0.2)
    torch.library.opcheck(torch.ops.scfm.flash_attention_forward.default, arguments)


@pytest.mark.parametrize("fault", ["log 2", "transposed", "no kernel", "ignores lse", "keys without queries"])
def test_kernels_of_other_conventions_are_not_trusted(make_problem, kernels, monkeypatch, fault):
    """The first use detects it and warns, and plain torch is used: results stay right."""

    def forward(*arguments):
        out, lse = stand_in_forward(*arguments)
        if fault == "no kernel":
            raise RuntimeError("no kernel image is available")
        return out, lse / 0.6931 if fault == "log 2" else lse.T.contiguous().view_as(
            lse
        ) if fault == "transposed" else lse

    def backward(grad_out, q, k, v, out, lse, layout, scale):
        if fault == "ignores lse":
            out, lse = stand_in_forward(q, k, v, layout, scale)
        grads = stand_in_backward(grad_out, q, k, v, out, lse, layout, scale)
        if fault == "keys without queries":
            for cell in (layout.cu_q.diff() == 0).nonzero()[:, 0].tolist():
                grads[1][layout.cu_k[cell] : layout.cu_k[cell + 1]] = 7.0  # memory as it was found
        return grads

    monkeypatch.setattr(flash, "flash_forward", forward)
    monkeypatch.setattr(flash, "flash_backward", backward)
    problem = make_problem([20, 9], head_dim=32, dtype=torch.bfloat16, known=[13, 0])
    with pytest.warns(UserWarning, match=r"flash attention on cpu in torch\.bfloat16 at head width 32"):
        found = problem.run(attention)
    expected = problem.run(oracle.attention, torch.float64)
    for name, value in expected.items():
        assert (found[name].double() - value).abs().max() <= 0.02 * max(1.0, value.abs().max()), name


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes; `paused` while torch's kernels are stood in for."""

    def __init__(self):
        super().__init__()
        self.elements, self.paused = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not self.paused:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result

    def aside(self, function):
        def call(*arguments):
            self.paused = True
            result = function(*arguments)
            self.paused = False
            return result

        return call


N = 1200
SHAPES = {
    "plain": (None, None, False),
    "generative": (None, torch.tensor([700, 3]), False),
    "cross": (torch.tensor([0, N - 5, N]), None, False),
    "key bias": (None, None, True),
    "generative, key bias": (None, torch.tensor([700, 3]), True),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("route", ["flash", "torch"])
def test_no_backend_has_a_matrix_of_scores_in_memory(kernels, monkeypatch, route, shape):
    cu_seqlens_k, n_known, with_bias = shape
    q, k, v, grad_out = torch.randn(4, N, 1, 32, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    bias = torch.zeros(N, 1) if with_bias else None
    options = OperatorOptions(torch.tensor([0, N - 10, N]), cu_seqlens_k, n_known, bias, 0.2)
    assert flash.is_trusted(q)
    watch = LargestTensor()
    monkeypatch.setattr(flash, "flash_forward", watch.aside(stand_in_forward))
    monkeypatch.setattr(flash, "flash_backward", watch.aside(stand_in_backward))
    with watch:
        if route == "flash":
            out, lse = flash.forward(q, k, v, options)
            flash.backward(grad_out, torch.ones_like(lse), q, k, v, out, lse, options)
        else:
            out, lse = reference.forward(q, k, v, options, return_lse=True)
            reference.forward(q, k, v, options, return_lse=False)
            reference.backward(grad_out, torch.ones_like(lse), q, k, v, options)
            reference_keys.column_sums(q, k, options)
            reference_keys.deletion_effects(grad_out, q, k, v, out, options)
    assert N * 32 <= watch.elements < N * N / 4


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cuda", torch.float32, 64, True),
        ("cuda", torch.float64, 64, False),
        ("cuda", torch.float32, 20, False),
        ("cuda", torch.float16, 512, False),
        ("cpu", torch.float64, 20, True),
    ],
)
def test_torchs_attention_is_called_if_it_needs_no_matrix_of_scores(device, dtype, head_dim, expected):
    with FakeTensorMode():
        assert reference.is_fused_by_torch(torch.empty(3, 1, head_dim, dtype=dtype, device=device)) is expected


def test_torchs_own_kernels_have_the_arguments_that_are_passed():
    """Names and order of the private operators; on a CPU build they exist as schemas."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    ]  # fmt: skip
    assert "scale" in names
    names = [argument.name for argument in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    assert names[:15] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
        "is_causal", "rng_state", "unused", "scale",
    ]  # fmt: skip
