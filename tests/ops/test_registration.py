"""The operators in torch: schemas, fake tensors, compilation, memory, and errors."""

# Axes: B cells, T packed tokens, H heads, K head width.

import os
import subprocess
import sys

import pytest
import torch

from scfm import ops
from scfm.ops import extension
from scfm.ops.options import OperatorOptions

HAS_KERNELS = ops.extension_info()["available"]
NEEDS_KERNELS = pytest.mark.skipif(not HAS_KERNELS, reason="needs the compiled extension")
BACKENDS = ["torch", pytest.param("fused", marks=NEEDS_KERNELS)]


def arguments(problem, *, grad):
    tensors = [tensor.clone().requires_grad_(grad) for tensor in (problem.q, problem.k, problem.v)]
    bias = problem.options["key_bias"].clone().requires_grad_(grad)
    return (*tensors, problem.cu_seqlens, None, problem.options["n_known"], bias, 0.125)


@NEEDS_KERNELS
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_the_fused_operator(make_problem, grad):
    problem = make_problem([9, 0, 40], known=[3, 0, 40], bias="head")
    torch.library.opcheck(torch.ops.scfm.attention_forward.default, arguments(problem, grad=grad))


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck_of_the_torch_operator(make_problem, return_lse):
    problem = make_problem([9, 0, 40], known=[3, 0, 40], bias="head")
    torch.library.opcheck(torch.ops.scfm.torch_attention_forward.default, (*arguments(problem, grad=True), return_lse))


@NEEDS_KERNELS
@pytest.mark.parametrize("name", ["forward", "backward", "column_sums", "deletion_effects"])
def test_the_compiled_operators_have_the_options_of_the_python_ones(name):
    schema = str(getattr(torch.ops.scfm, f"attention_{name}").default._schema)
    assert f", {OperatorOptions.SCHEMA}) -> " in schema


def test_an_unknown_option_is_an_error():
    q = torch.zeros(2, 1, 8)
    with pytest.raises(TypeError, match="`n_know` is not an option of attention; use one of cu_seqlens_k, n_known"):
        ops.attention(q, q, q, torch.tensor([0, 2]), n_know=torch.tensor([1]))


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.backend = backend

    def forward(self, hidden_TD, cu_seqlens, plan=None):
        q, k, v = self.qkv(hidden_TD).view(-1, 3, 2, 16).unbind(1)
        return ops.attention(q, k, v, cu_seqlens, plan=plan, backend=self.backend).flatten(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("planned", [False, True])
def test_a_compiled_model_has_one_graph_and_the_same_gradients(backend, planned):
    layer = Layer(backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([7, 12], [3, 0, 20, 5]):
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        plan = ops.make_plan(cu_seqlens) if planned else None
        hidden = torch.randn(sum(lengths), 32)
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            out = function(hidden, cu_seqlens, plan)
            out.square().sum().backward()
            results.append((out.detach(), layer.qkv.weight.grad.clone()))
        for eager, traced in zip(*results):
            torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_boundaries_are_checked_when_a_compiled_graph_runs(backend):
    compiled = torch.compile(Layer(backend), fullgraph=True, backend="aot_eager")
    with pytest.raises((RuntimeError, ValueError), match="ends at 4"):
        compiled(torch.randn(5, 32), torch.tensor([0, 2, 4]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_follows_the_boundaries_and_not_another_plan(backend):
    torch.compiler.reset()  # other tests compile the same code for other shapes
    layer, hidden, bounds = Layer(backend), torch.randn(5, 32), torch.tensor([0, 2, 5])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = compiled(hidden, bounds, ops.make_plan(torch.tensor([0, 4, 5])))
    torch.testing.assert_close(found, layer(hidden, bounds, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_an_error(backend):
    q = torch.randn(5, 2, 8, requires_grad=True)
    out = ops.attention(q, q, q, torch.tensor([0, 5]), backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grad.square().sum().backward()


Q = torch.zeros(6, 2, 8)
BOUNDS = torch.tensor([0, 2, 6])
ERRORS = {
    "two axes": ({"q": torch.zeros(6, 16)}, ValueError, r"`q` has shape \(6, 16\)"),
    "integers": ({"q": Q.int(), "k": Q.int(), "v": Q.int()}, TypeError, "`q` holds torch.int32"),
    "mixed dtypes": ({"v": Q.bfloat16()}, TypeError, "`v` holds torch.bfloat16 and `q` torch.float32"),
    "other device": ({"k": Q.to("meta")}, ValueError, "`k` is on meta and `q` on cpu"),
    "other heads": ({"k": torch.zeros(6, 1, 8)}, ValueError, "`k` has .heads, head width. .1, 8."),
    "values short": ({"v": torch.zeros(5, 2, 8)}, ValueError, "`k` has 6 tokens and `v` 5"),
    "no width": ({"q": Q[..., :0], "k": Q[..., :0], "v": Q[..., :0]}, ValueError, "head width is 0"),
    "keys short": ({"k": Q[:5], "v": Q[:5]}, ValueError, "Pass `cu_seqlens_k`"),
    "float bounds": ({"cu_seqlens": BOUNDS.float()}, TypeError, "`cu_seqlens` holds torch.float32"),
    "list bounds": ({"cu_seqlens": [0, 6]}, TypeError, "`cu_seqlens` is a list"),
    "square bounds": ({"cu_seqlens": BOUNDS[None]}, ValueError, "must have one axis"),
    "no bounds": ({"cu_seqlens": BOUNDS[:0]}, ValueError, "`cu_seqlens` is empty"),
    "late start": ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, "starts at 1"),
    "falling": ({"cu_seqlens": torch.tensor([0, 5, 4, 6])}, ValueError, "decreases from 5 to 4 at cell 1"),
    "short bounds": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "ends at 5, but there are 6 tokens"),
    "long bounds": ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "ends at 7, but there are 6 tokens"),
    "key bounds": ({"cu_seqlens_k": torch.tensor([0, 6])}, ValueError, "`cu_seqlens_k` has 2 entries"),
    "many known": ({"n_known": torch.tensor([3, 1])}, ValueError, "`n_known` is 3 for cell 0 of 2 tokens"),
    "minus known": ({"n_known": torch.tensor([1, -1])}, ValueError, "`n_known` is -1 for cell 1"),
    "known short": ({"n_known": torch.tensor([1])}, ValueError, "`n_known` has 1 entries for 2 cells"),
    "known across": ({"n_known": BOUNDS[:2], "cu_seqlens_k": BOUNDS}, ValueError, "needs self-attention"),
    "bias shape": ({"key_bias": torch.zeros(6, 3)}, ValueError, r"`key_bias` has shape \(6, 3\)"),
    "bias dtype": ({"key_bias": torch.zeros(6, dtype=torch.int64)}, TypeError, "`key_bias` holds torch.int64"),
    "scale": ({"scale": float("nan")}, ValueError, "`scale` is nan"),
    "scale beyond float32": ({"scale": 1e300}, ValueError, "`scale` is 1e.300; scores are computed in torch.float32"),
    "backend": ({"backend": "cuda"}, ValueError, "`backend` is 'cuda'"),
    "plan": ({"plan": ops.make_plan(torch.tensor([0, 6]))}, ValueError, "`plan` was made for 1 cells"),
    "plan of other bounds": (
        {"plan": ops.make_plan(torch.tensor([0, 3, 6]))},
        ValueError,
        "entry 1 is 3 in the plan and 2",
    ),
    "plan of other known": (
        {"plan": ops.make_plan(BOUNDS, n_known=torch.tensor([2, 1])), "n_known": torch.tensor([2, 3])},
        ValueError,
        "another `n_known`: entry 1 is 1 in the plan and 3",
    ),
    "plan of other keys": (
        {"plan": ops.make_plan(BOUNDS, cu_seqlens_k=torch.tensor([0, 1, 6])), "cu_seqlens_k": BOUNDS},
        ValueError,
        "another `cu_seqlens_k`",
    ),
    "plan known": ({"plan": ops.make_plan(BOUNDS), "n_known": BOUNDS[:2]}, ValueError, "made without `n_known`"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_arguments_are_errors_with_the_reason(change, error, message):
    call = {"q": Q, "k": Q, "v": Q, "cu_seqlens": BOUNDS} | change
    with pytest.raises(error, match=message):
        ops.attention(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("cu_seqlens"), **call)


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(6, 2, 4), "`k` has shape"),
        (2, torch.zeros(6, 2, 8).double(), "differ in dtype"),
        (3, torch.tensor([0, 7]), "ends at 7"),
        (3, torch.tensor([0, 9, 6]), "decreases from 9 to 6"),
        (3, torch.tensor([]), "must hold int32 or int64"),
        (5, torch.tensor([7, 0]), "`n_known` is 7"),
        (6, torch.zeros(5, 2), "`key_bias` must be float32"),
    ],
)
def test_the_operator_itself_checks_what_would_read_out_of_bounds(position, value, message):
    call = [Q, Q, Q, BOUNDS, None, None, None, 1.0]
    call[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.scfm.attention_forward(*call)


@pytest.mark.skipif(not HAS_KERNELS, reason="without the extension every call is an error")
def test_fused_is_an_error_for_unsupported_calls():
    wide = torch.zeros(6, 2, 257)
    with pytest.raises(RuntimeError, match="head width is 257"):
        ops.attention(wide, wide, wide, BOUNDS, backend="fused")
    assert ops.attention(wide, wide, wide, BOUNDS).shape == wide.shape
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        ops.attention(Q.double(), Q.double(), Q.double(), BOUNDS, backend="fused")


def test_the_extension_can_be_turned_off():
    code = (
        "import torch; from scfm import ops; info = ops.extension_info(); assert not info['available'], info;"
        "assert 'SCFM_DISABLE_EXT' in info['reason'] and info['backends'] == ('torch',);"
        "q = torch.ones(3, 1, 4); print(ops.attention(q, q, q, torch.tensor([0, 3])).sum().item())"
    )
    environment = {**os.environ, "SCFM_DISABLE_EXT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12.0"


@NEEDS_KERNELS
def test_a_build_older_than_the_code_is_reported(monkeypatch):
    monkeypatch.setattr(extension, "OPERATORS", ("attention_forward", "operator_of_tomorrow"))
    path, reason = extension.load_extension.__wrapped__()
    assert path is None
    assert "older than the Python code: install again" in reason


@pytest.mark.slow
@NEEDS_KERNELS
def test_a_cell_of_16384_tokens_needs_little_memory():
    """Forward and backward in well under 1 GB beyond the tensors; one score matrix would take 1 GB per head."""
    code = """
import resource, torch
from scfm import ops
torch.set_num_threads(2)
qkv = torch.randn(16384, 3, 8, 64, requires_grad=True)
grad_out = torch.ones(16384, 8, 64)
cu_seqlens = torch.tensor([0, 16384])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = ops.attention(*qkv.unbind(1), cu_seqlens, backend="fused")
out.backward(grad_out)
tensors = (qkv.nbytes + 2 * qkv.nbytes + out.nbytes) / 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - tensors) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200.0


@NEEDS_KERNELS
def test_offsets_beyond_two_billion_elements():
    """Rows 2^31 elements apart: a view with a large stride, whose memory is not used in between."""
    try:
        storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("needs 4 GB of address space")
    far = storage.as_strided((2, 1, 32), (2**31, 32, 1))
    far.copy_(torch.randn(2, 1, 32))
    near = far.clone()
    bounds = torch.tensor([0, 2])
    found = ops.attention(far, far, far, bounds, backend="fused")
    assert torch.equal(found, ops.attention(near, near, near, bounds, backend="fused"))
