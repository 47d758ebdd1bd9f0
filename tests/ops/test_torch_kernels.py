"""Attention by torch's own kernels for GPUs, which are replaced here by stand-ins with the same contracts."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width.

import sys
import warnings
from types import SimpleNamespace

import accuracy
import oracle
import pytest
import stand_ins
import torch
from problems import Problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import scfm
from scfm import ops
from scfm.ops import backend, engines, layout, torch_kernels
from scfm.ops.options import check_key_bias
from scfm.ops.reference import attention as reference
from scfm.ops.reference import keys as reference_keys
from scfm.ops.torch_kernels import KernelOptions

FLASH_BF16, FLASH_FP16 = (engines.FLASH, torch.bfloat16), (engines.FLASH, torch.float16)
EFFICIENT = [(engines.EFFICIENT, dtype) for dtype in engines.EFFICIENT.dtypes]
ROUTES = {f"{engine.name} {dtype}": (engine, dtype) for engine, dtype in (FLASH_BF16, FLASH_FP16, *EFFICIENT)}


@pytest.fixture
def aten(monkeypatch):
    """Stand-ins in place of torch's operators, and nothing known about them yet."""
    functions = stand_ins.from_definition()
    monkeypatch.setattr(engines, "ATEN", functions)
    monkeypatch.setattr(torch_kernels, "_TRUSTED", {})
    return functions


def attend(q, k, v, options):
    return torch.ops.scfm.kernel_attention_forward(q, k, v, *options.arguments)


def attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, n_known=None, key_bias=None, scale=None):
    bias_TH = None if key_bias is None else check_key_bias(key_bias, k)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return attend(q, k, v, KernelOptions(cu_seqlens, cu_seqlens_k, n_known, bias_TH, scale))


LENGTHS, KNOWN, LENGTHS_K = [20, 90, 64, 65, 1], [13, 0, 64, 12, 0], [25, 0, 33, 11, 64]
OPTIONS = {
    "plain": {},
    "generative": {"known": KNOWN},
    "all known": {"known": LENGTHS},
    "none known": {"known": [0, 0, 0, 0, 0]},
    "cross": {"lengths_k": LENGTHS_K},
    "scale": {"known": KNOWN, "scale": -0.3},
    "bias": {"bias": "head"},
    "bias of keys, generative": {"bias": "key", "known": KNOWN},
    "bias, cross": {"bias": "head", "lengths_k": LENGTHS_K},
    "bias, scale": {"bias": "head", "scale": -0.3},
    "hidden keys": {"bias": "head", "hidden": [slice(0, 20), slice(21, 300, 3)]},
    "hidden keys, generative": {"bias": "head", "known": KNOWN, "hidden": [slice(0, 24), slice(40, 300, 2)]},
    "odd width": {"head_dim": 20, "known": KNOWN},
}


def problems(dtype, *, hidden=(), head_dim=32, **options):
    drawn = [Problem(LENGTHS, head_dim=head_dim, dtype=dtype, seed=seed, **options) for seed in accuracy.SEEDS]
    for problem in drawn:
        for rows in hidden:
            problem.options["key_bias"][rows] = -torch.inf
    return drawn


@pytest.mark.parametrize("kernels", [stand_ins.from_definition, stand_ins.cpu_flash], ids=["definition", "cpu flash"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_outputs_and_all_gradients(aten, monkeypatch, route, options, kernels):
    """With gradients of the output and of the log-sum-exp, by the accuracy rule of the fused kernels."""
    engine, dtype = route
    functions = kernels()
    monkeypatch.setattr(engines, "ATEN", functions)
    monkeypatch.setattr(torch_kernels, "ENGINES", (engine,))
    exact, plain, found = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for problem in problems(dtype, **options):
            exact.append(problem.run(oracle.attention, torch.float64))
            plain.append(problem.run(accuracy.plain_torch, dtype))
            found.append(problem.run(attention))
    for name in exact[0]:
        of_kernel, of_torch, truth = ([results[name] for results in each] for each in (found, plain, exact))
        accuracy.check(of_kernel, truth, accuracy.root_mean_square_error(of_torch, truth), name)
    assert {launch.split()[0] for launch in functions.launches} == {engine.name}


def test_a_cell_is_the_same_in_any_number_of_launches(aten, monkeypatch):
    """A grid ends at 65,535 cells; here at 2, so that three launches do what one does."""
    results = []
    for limit in (65_535, 2):
        monkeypatch.setattr(layout, "MAX_CELLS", limit)
        problem = problems(torch.float32, bias="head", known=KNOWN)[0]
        problem.run(attention)
        aten.launches.clear()
        results.append(problem.run(attention))
        n_launches = -(-len(LENGTHS) // limit)
        assert aten.launches == ["efficient forward"] * n_launches + ["efficient backward"] * n_launches
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-6)


def test_no_query_and_no_key(aten):
    for dtype in (torch.bfloat16, torch.float32):
        found = Problem([0, 3], lengths_k=[4, 0], head_dim=32, dtype=dtype, bias="head").run(attention)
        assert (found["out"] == 0).all()
        assert (found["lse"] == -torch.inf).all()
        for name in ("q", "k", "v", "key_bias"):
            assert (found[name] == 0).all(), name


def test_a_gradient_of_the_output_alone_and_no_cells(aten):
    q, k, v = torch.randn(3, 7, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_().unbind()
    out, _ = attention(q, k, v, torch.tensor([0, 7]))
    expected = torch.autograd.grad(oracle.attention(q.float(), k.float(), v.float(), torch.tensor([0, 7]))[0].sum(), v)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), v)[0], expected[0], rtol=0.02, atol=0.02)
    empty = torch.zeros(0, 2, 32, requires_grad=True)
    attention(empty, empty, empty, torch.tensor([0]))[0].sum().backward()
    assert empty.grad.shape == (0, 2, 32)


def test_views_that_the_kernels_could_not_load_are_copied(aten):
    """Of a packed projection off the raster of 16 bytes; the stand-ins refuse them."""
    drawn = torch.randn(9 * 3 * 2 * 32 + 1, generator=torch.Generator().manual_seed(0))
    packed = drawn[1:].view(9, 3, 2, 32)
    cu_seqlens = torch.tensor([0, 4, 9])
    found, dense = (attention(*tensor.unbind(1), cu_seqlens)[0] for tensor in (packed, packed.clone()))
    assert torch.equal(found, dense)


def test_gradients_have_the_strides_that_a_traced_graph_expects(aten):
    """As of the fake tensors: contiguous, also from permuted views."""
    for bias in (None, torch.zeros(9, 2)):
        q, k, v = (torch.randn(2, 9, 32).bfloat16().transpose(0, 1) for _ in range(3))
        options = KernelOptions(torch.tensor([0, 4, 9]), None, torch.tensor([2, 5]), bias, 0.2)
        out, lse = torch_kernels.forward(q, k, v, options)
        grads = torch_kernels.backward(out, lse, q, k, v, out, lse, options)
        assert all(tensor.is_contiguous() for tensor in (out, lse, *grads))


def test_deterministic_mode_splits_no_keys(aten):
    problem = problems(torch.float32, known=KNOWN)[0]
    expected = problem.run(attention)
    torch.use_deterministic_algorithms(True)
    try:  # the stand-ins check the number of splits
        found = problem.run(attention)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("bias", [None, "head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(aten, dtype, bias):
    problem = Problem([9, 0, 20], head_dim=32, dtype=dtype, known=[3, 0, 20], bias=bias)
    leaves = [tensor.requires_grad_() for tensor in (problem.q, problem.k, problem.v)]
    key_bias = problem.options["key_bias"].requires_grad_() if bias else None
    arguments = (*leaves, problem.cu_seqlens, None, problem.options["n_known"], key_bias, 0.2, None, None)
    attention(*(tensor.detach() for tensor in leaves), problem.cu_seqlens)  # the comparison at first use
    torch.library.opcheck(torch.ops.scfm.kernel_attention_forward.default, arguments)


def test_autocast_changes_nothing_inside(aten):
    problem = problems(torch.float32, known=KNOWN, bias="head")[0]
    expected = problem.run(attention)
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.run(attention)
    for name in expected:
        assert torch.equal(found[name], expected[name])


FAULTS = ["log 2", "transposed", "no kernel", "ignores lse", "keys without queries", "shifted keys"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("route", [FLASH_BF16, (engines.EFFICIENT, torch.float32)], ids=["flash", "efficient"])
def test_kernels_of_other_conventions_are_not_trusted(aten, monkeypatch, route, fault):
    """The first use detects it and warns, and plain torch is used: results stay right."""
    engine, dtype = route

    def forward(q, k, v, part, scale):
        if fault == "no kernel":
            raise RuntimeError("no kernel image is available")
        if fault == "shifted keys":
            k = k.roll(1, 0)
        out, lse = engine.forward(q, k, v, part, scale)
        changed = {"log 2": lambda: lse / 0.6931, "transposed": lambda: lse.T.contiguous().view_as(lse)}
        return out, changed.get(fault, lambda: lse)()

    def backward(grad_out, q, k, v, out, lse, part, scale):
        if fault == "ignores lse":
            out, lse = engine.forward(q, k, v, part, scale)
            lse = lse.nan_to_num(posinf=torch.inf)
        grads = engine.backward(grad_out, q, k, v, out, lse, part, scale)
        if fault == "keys without queries":
            for cell in (part.cu_q.diff() == 0).nonzero()[:, 0].tolist():
                grads[1][part.cu_k[cell] : part.cu_k[cell + 1]] = 7.0  # memory as it was found
        return grads

    faulty = engines.Engine(engine.name, engine.dtypes, engine.max_width, forward, backward)
    monkeypatch.setattr(torch_kernels, "ENGINES", (faulty,))
    problem = Problem([20, 9], head_dim=32, dtype=dtype, known=[13, 0])
    with pytest.warns(UserWarning, match=rf"torch's {engine.name} attention on cpu in {dtype} at head width 32"):
        found = problem.run(attention)
    expected = problem.run(oracle.attention, torch.float64)
    for name, value in expected.items():
        assert (found[name].double() - value).abs().max() <= 0.02 * max(1.0, value.abs().max()), name


def test_the_next_engine_takes_over(aten, monkeypatch):
    """Flash that fails, as on cards before compute capability 8.0, and head widths that it has no kernel for."""
    assert torch_kernels.engine_of(torch.device("cpu"), torch.float16, 256, extra=False) is engines.FLASH
    assert torch_kernels.engine_of(torch.device("cpu"), torch.float16, 256) is engines.EFFICIENT
    assert torch_kernels.engine_of(torch.device("cpu"), torch.float64, 64) is None
    monkeypatch.setattr(aten, "_flash_attention_forward", lambda *_, **__: torch.zeros(()).view(-1, 7))
    with pytest.warns(UserWarning, match="flash attention on cpu .* fails"):
        assert torch_kernels.engine_of(torch.device("cpu"), torch.float16, 64) is engines.EFFICIENT


@pytest.mark.parametrize("generative", [False, True])
def test_a_compiled_block_is_one_graph_compiled_once_for_cells_of_any_lengths(aten, monkeypatch, generative):
    """With the layout of the plan where the tensors are, as on a GPU; scGPT's target tokens skip the output projection."""
    monkeypatch.setattr(sys.modules["scfm.ops.attention"], "choose_backend", lambda *_, **__: "kernels")
    sizes = {"n_tokens": 9, "d_model": 32, "n_heads": 2, "d_ff": 32, "dropout": 0.0}
    config = scfm.ModelConfig.from_dict({**sizes, "attention": {"skip_target_projection": True}})
    block, counter = scfm.nn.Block(config), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    n_compilations = []
    for lengths in ([7, 12, 30], [3, 20, 5, 9], [40, 31], [2, 2, 2, 2, 17], [6, 50, 21]):
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        plan = ops.make_plan(bounds, n_known=torch.tensor(lengths) // 2 if generative else None).laid_out()
        hidden = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(0))
        results = []
        for function in (block, compiled):
            block.zero_grad()
            out = function(hidden, plan)
            out.square().sum().backward()
            results.append([out.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        n_compilations.append(counter.frame_count)
    assert n_compilations[-1] == n_compilations[-2] <= 2  # sizes that were equal by chance may differ
    assert "efficient backward" in aten.launches


def test_the_path_of_each_dtype_is_told_with_the_reason(aten, monkeypatch):
    monkeypatch.setattr(backend, "choose_backend", lambda *_: "kernels")
    told = {dtype: backend.explain_backend(torch.empty(1, 1, 64, dtype=dtype)) for dtype in engines.EFFICIENT.dtypes}
    assert told[torch.float32][0] == "torch's efficient kernels"
    assert told[torch.bfloat16][0] == told[torch.float16][0] == "torch's flash kernels"
    assert all("their results are those of plain torch, and" in reason for _, reason in told.values())
    monkeypatch.setattr(torch_kernels, "ENGINES", ())
    name, reason = backend.explain_backend(torch.empty(1, 1, 64))
    assert name == "torch"
    assert "no kernel of torch gave the results of plain torch" in reason


def test_a_plan_that_was_sent_gives_the_same(aten):
    """The operator takes the layout of the plan in place of the boundaries."""
    problem = problems(torch.float32, known=KNOWN)[0]
    plan = ops.make_plan(problem.cu_seqlens, n_known=problem.options["n_known"]).laid_out()
    options = KernelOptions(plan.cu_seqlens, None, plan.n_known, None, 0.2)
    sent = KernelOptions(*options.arguments[:5], plan.layout.packed, plan.layout.extents)
    tensors = problem.q, problem.k, problem.v
    for found, expected in zip(attend(*tensors, sent), attend(*tensors, options)):
        assert torch.equal(found, expected)


def test_a_layout_holds_what_the_boundaries_say():
    plan = ops.make_plan(torch.tensor([0, 3, 3, 7]), n_known=torch.tensor([2, 0, 0])).laid_out()
    sections = plan.layout.sections()
    assert sections.cu_q.tolist() == [0, 3, 3, 7]
    assert sections.cu_k.tolist() == [0, 2, 2, 2]
    assert sections.cell_T.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert sections.position_T.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert sections.is_target_T.tolist() == [False, False, True, True, True, True, True]
    assert (sections.context_S.tolist(), sections.target_U.tolist()) == ([0, 1], [2, 3, 4, 5, 6])
    assert sections.keyless_N.tolist() == [3, 4, 5, 6]
    assert (sections.longest_q, sections.longest_k) == (4, 2)
    cross = ops.make_plan(torch.tensor([0, 1, 2]), cu_seqlens_k=torch.tensor([0, 5, 9])).laid_out().layout.sections()
    assert (cross.cu_k.tolist(), cross.longest_k, cross.context_S, cross.keyless_N) == ([0, 5, 9], 5, None, None)


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
        def call(*arguments, **keywords):
            self.paused = True
            result = function(*arguments, **keywords)
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
@pytest.mark.parametrize("route", ["kernels", "torch"])
def test_no_backend_has_a_matrix_of_scores_in_memory(aten, monkeypatch, route, shape):
    cu_seqlens_k, n_known, with_bias = shape
    q, k, v, grad_out = torch.randn(4, N, 1, 32, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    bias = torch.zeros(N, 1) if with_bias else None
    options = KernelOptions(torch.tensor([0, N - 10, N]), cu_seqlens_k, n_known, bias, 0.2)
    attend(q, q, q, options)  # the comparison at first use
    watch = LargestTensor()
    monkeypatch.setattr(engines, "ATEN", SimpleNamespace(**{
        name: watch.aside(function) for name, function in vars(aten).items() if callable(function)
    }))  # fmt: skip
    with watch:
        if route == "kernels":
            out, lse = torch_kernels.forward(q, k, v, options)
            torch_kernels.backward(grad_out, torch.ones_like(lse), q, k, v, out, lse, options)
        else:
            out, lse = reference.forward(q, k, v, options, return_lse=True)
            reference.forward(q, k, v, options, return_lse=False)
            reference.backward(grad_out, torch.ones_like(lse), q, k, v, options)
            reference_keys.column_sums(q, k, options)
            reference_keys.deletion_effects(grad_out, q, k, v, options)
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
    for name, expected in (
        (
            "_flash_attention_forward",
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
        ),
        (
            "_flash_attention_backward",
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused scale",
        ),
        (
            "_efficient_attention_forward",
            "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type "
            "compute_log_sumexp scale",
        ),
        (
            "_efficient_attention_backward",
            "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p "
            "philox_seed philox_offset custom_mask_type bias_requires_grad scale num_splits_key",
        ),
    ):
        arguments = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
        expected = expected.split()
        assert arguments[: len(expected)] == expected, name
    assert "scale" in [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
