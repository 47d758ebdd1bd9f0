"""The CUDA kernels, run thread by thread on the CPU, against the float64 oracle: index arithmetic, masks, synchronization.

Speed is not tested here, nor whether a GPU's compiler and memory follow the rules that the emulated machine checks.
"""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width.

from itertools import pairwise

import accuracy
import cuda_machine as machine
import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scfm.ops.options import OperatorOptions
from scfm.ops.reference import keys as reference

pytestmark = pytest.mark.skipif(not machine.AVAILABLE, reason=machine.NEEDS)
EMULATED_ONLY = pytest.mark.skipif(machine.ON_GPU, reason="looks into the emulated machine")

DTYPES = [torch.bfloat16, torch.float16]
RAGGED = [20, 200, 64, 65, 129]
OPTIONS = {
    "plain": {},
    "generative": {"known": [13, 150, 64, 0, 128]},
    "key bias": {"bias": "key"},
    "head bias, generative": {"bias": "head", "known": [20, 199, 3, 65, 33]},
    "cross": {"lengths_k": [25, 140, 0, 11, 64], "bias": "head"},
    "negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0, "bias": "key"},
}


CUT_SHORT = {
    "head bias, generative": {"bias": "head", "known": [130, 33]},
    "cross": {"lengths_k": [140, 5], "bias": "head"},
}


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def largest_error(found, expected):
    return accuracy.error(found, expected).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_errors_stay_within_a_multiple_of_plain_torch(make_problem, options, dtype, deterministic):
    accuracy.check_attention([make_problem(RAGGED, dtype=dtype, **options)], machine.attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("options", ["plain", "head bias, generative", "cross"])
def test_the_other_head_widths(make_problem, head_dim, options, dtype, deterministic):
    problem = make_problem(RAGGED, n_heads=1, head_dim=head_dim, dtype=dtype, **OPTIONS[options])
    accuracy.check_attention([problem], machine.attention)


@pytest.mark.parametrize("known", [None, 0, 1, -1], ids=["all", "none", "one", "all but one"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_one_more_or_less_than_a_block(make_problem, head_dim, known, deterministic):
    """Every length is a cell of its own; results of cells are independent, which is tested below."""
    lengths = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    n_known = None if known is None else [min(n, known) if known >= 0 else max(n - 1, 0) for n in lengths]
    problem = make_problem(lengths, n_heads=1, head_dim=head_dim, dtype=torch.bfloat16, known=n_known)
    expected = problem.run(oracle.attention, torch.float64)
    for name, value in problem.run(machine.attention).items():
        largest = expected[name].masked_fill(expected[name].isinf(), 0.0).abs().max().item()
        assert largest_error(value, expected[name]) <= 3 * torch.finfo(torch.bfloat16).eps * max(1.0, largest), name


def test_a_query_that_attends_to_no_key_gives_zero(make_problem, deterministic):
    hidden = make_problem([20, 70], dtype=torch.bfloat16, bias="key")
    hidden.options["key_bias"][:20] = -torch.inf
    hidden.grad_lse[:] = 1.0
    found = hidden.run(machine.attention)
    assert (found["lse"][:20] == -torch.inf).all()
    for name in ("out", "q", "k", "v", "key_bias"):
        assert (found[name][:20] == 0).all(), name
        assert (found[name][20:] != 0).any(), name

    keyless = make_problem([20, 30], lengths_k=[0, 5], dtype=torch.float16)
    found = keyless.run(machine.attention)
    assert (found["out"][:20] == 0).all()
    assert (found["q"][:20] == 0).all()
    assert (found["lse"][:20] == -torch.inf).all()


def test_keys_without_queries_and_hidden_keys_get_zero_gradients(make_problem, deterministic):
    problem = make_problem([0, 4], lengths_k=[140, 5], dtype=torch.float16, bias="head")
    found = problem.run(machine.attention)
    for name in ("k", "v", "key_bias"):
        assert (found[name][:140] == 0).all(), name
    problem = make_problem([70], dtype=torch.bfloat16, bias="key", known=[66])
    problem.options["key_bias"][[3, 65]] = -torch.inf
    found = problem.run(machine.attention)
    for name in ("k", "v", "key_bias"):
        assert (found[name][[3, 65]] == 0).all(), name


def test_a_single_target_token_attends_to_itself(make_problem, deterministic):
    problem = make_problem([1, 40], dtype=torch.bfloat16, known=[0, 0])
    found = problem.run(machine.attention)
    torch.testing.assert_close(found["out"], problem.v)
    torch.testing.assert_close(found["v"], problem.grad_out)


def test_a_low_bias_of_all_keys_brings_nothing_from_past_the_end(make_problem, deterministic):
    """Rows past the end score 0: far above every true key here, so that counting them would overflow, and 0 times inf is NaN."""
    problem = make_problem([20, 70], dtype=torch.bfloat16, bias="key", known=[20, 66])
    expected = problem.run(machine.attention)
    problem.options["key_bias"] -= 200.0
    found = problem.run(machine.attention)
    torch.testing.assert_close(found.pop("lse") + 200.0, expected.pop("lse"), rtol=0, atol=1e-3)
    for name, value in found.items():
        assert largest_error(value, expected[name].double()) <= 2e-2 * expected[name].abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("known", [None, [17, 21]], ids=["plain", "generative"])
def test_not_a_number_stays_in_its_cell(make_problem, dtype, known, deterministic):
    """Rows past the end are zero, not only masked: 0 times a neighbor's NaN would be NaN."""
    problem = make_problem([33, 40], dtype=dtype, known=known)
    clean = problem.run(machine.attention)
    for tensor in (problem.q, problem.k, problem.v, problem.grad_out):
        tensor[33:] = torch.nan
    found = problem.run(machine.attention)
    for name, value in clean.items():
        assert torch.equal(found[name][:33], value[:33]), name
        assert found[name][33:].isnan().all(), name


@EMULATED_ONLY
@pytest.mark.parametrize("options", ["head bias, generative", "cross"])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(make_problem, options, deterministic, monkeypatch):
    """Drawn turns instead of lane by lane, warp by warp and block by block: what a missing barrier would come out by."""
    problem = make_problem([150, 65], n_heads=1, dtype=torch.float16, **CUT_SHORT[options])
    expected = problem.run(machine.attention)
    for seed in range(2):
        monkeypatch.setenv("SCFM_EMULATE_SEED", str(seed))
        for name, value in problem.run(machine.attention).items():
            if name == "q" and not deterministic:  # sums over blocks of keys in any order
                torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=1e-4)
            else:
                assert torch.equal(value, expected[name]), (seed, name)


@EMULATED_ONLY
@pytest.mark.parametrize("operator", ["attention_column_sums", "attention_deletion_effects"])
def test_key_sums_in_any_order_of_threads(make_problem, operator, monkeypatch):
    problem = make_problem([150, 65], n_heads=1, dtype=torch.bfloat16, known=[130, 20])
    bounds = machine.bounds_of(problem.q, problem.k, problem.cu_seqlens, **problem.options)
    out, lse = machine.attention(problem.q, problem.k, problem.v, problem.cu_seqlens, **problem.options)
    tensors = (problem.q, problem.k, lse)
    if operator == "attention_deletion_effects":
        tensors = (problem.grad_out, problem.q, problem.k, problem.v, out, lse)
    expected = getattr(machine.operators(), operator)(*tensors, *bounds)
    monkeypatch.setenv("SCFM_EMULATE_SEED", "3")
    assert torch.equal(getattr(machine.operators(), operator)(*tensors, *bounds), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"known": [2, 130, 0, 0, 64], "bias": "head"}], ids=["plain", "generative"])
def test_alone_or_among_others_is_bitwise_the_same(make_problem, options, dtype):
    # On a GPU the other form adds gradients of queries in any order.
    torch.use_deterministic_algorithms(machine.ON_GPU)
    try:
        compare_alone_and_among_others(make_problem, options, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def compare_alone_and_among_others(make_problem, options, dtype):
    together = make_problem([5, 180, 0, 1, 64], dtype=dtype, **options)
    found = together.run(machine.attention)
    for cell, (begin, end) in enumerate(pairwise(together.cu_seqlens.tolist())):
        alone = make_problem([end - begin], dtype=dtype)
        for name in ("q", "k", "v", "grad_out", "grad_lse"):
            setattr(alone, name, getattr(together, name)[begin:end])
        if options:
            alone.options = {
                "n_known": together.options["n_known"][cell : cell + 1],
                "key_bias": together.options["key_bias"][begin:end],
            }
        for name, value in alone.run(machine.attention).items():
            assert torch.equal(value, found[name][begin:end]), (cell, name)


@pytest.mark.parametrize("factor", [2.0**-17, 2.0**12], ids=["small", "large"])
def test_float16_gradients_of_scores_stay_in_range(make_problem, factor, deterministic):
    """Gradients of scores are rounded to float16 between two products; unscaled they would vanish, or overflow."""
    problem = make_problem([150, 70], dtype=torch.float16, bias="key", known=[100, 70])
    problem.grad_lse *= factor
    problem.grad_out = (problem.grad_out * factor).half()
    if factor > 1:
        problem.v = problem.v * 30  # products with grad_out beyond 65,504
        assert (problem.grad_out.double() @ problem.v.double().mT).abs().max() > 1e6
    expected = problem.run(oracle.attention, torch.float64)
    found = problem.run(machine.attention)
    for name in ("q", "k", "v", "key_bias"):
        in_range = expected[name].abs() < 6e4
        error = (found[name].double() - expected[name])[in_range].abs().max()
        # Half the distance of float16 below its normal range is what rounding the result itself costs.
        assert error <= 4e-3 * expected[name].abs().max() + 2.0**-25, name


def test_large_scores_do_not_overflow(make_problem, deterministic):
    problem = make_problem([100, 3], dtype=torch.bfloat16, scale=20.0)
    found = problem.run(machine.attention)
    expected = problem.run(oracle.attention, torch.float64)
    assert all(value.isfinite().all() for value in found.values())
    assert largest_error(found["lse"], expected["lse"]) <= 1e-5 * expected["lse"].abs().max()


@EMULATED_ONLY
def test_views_of_a_packed_projection_are_read_without_a_copy(make_problem):
    qkv = torch.randn(150, 3, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    cu_seqlens = torch.tensor([0, 50, 150])
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies.extend([function] if function is torch.ops.aten.copy_.default else [])
            return function(*args, **(kwargs or {}))

    expected = machine.attention(*(part.contiguous() for part in qkv.unbind(1)), cu_seqlens)
    with Watch():
        found = machine.attention(*qkv.unbind(1), cu_seqlens)
    assert not copies
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


def test_rows_off_the_raster_of_16_bytes_are_copied(make_problem):
    storage = torch.randn(60 * 2 * 64 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    shifted = storage[1:].view(60, 2, 64)
    narrow = torch.randn(60, 2, 68, generator=torch.Generator().manual_seed(1)).bfloat16()[..., :64]
    cu_seqlens = torch.tensor([0, 60])
    for tensor in (shifted, narrow):
        found = machine.attention(tensor, tensor, tensor, cu_seqlens)
        copied = tensor.clone(memory_format=torch.contiguous_format)
        for ours, theirs in zip(found, machine.attention(copied, copied, copied, cu_seqlens)):
            assert torch.equal(ours, theirs)


def test_an_expanded_gradient(make_problem):
    problem = make_problem([40], dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (problem.q, problem.k, problem.v)]
    out, _ = machine.attention(*leaves, problem.cu_seqlens)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for ours, theirs in zip(expanded, torch.autograd.grad(out, leaves, torch.ones_like(out))):
        assert torch.equal(ours, theirs)


def test_offsets_beyond_two_billion_elements():
    try:
        storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device="cuda" if machine.ON_GPU else "cpu")
    except RuntimeError:
        pytest.skip("needs 4 GB of address space")
    far = storage.as_strided((2, 1, 32), (2**31, 32, 1))
    far.copy_(torch.randn(2, 1, 32))
    near = far.clone(memory_format=torch.contiguous_format)
    bounds = torch.tensor([0, 2])
    for ours, theirs in zip(machine.attention(far, far, far, bounds), machine.attention(near, near, near, bounds)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"known": [0, 1, 130, 33], "bias": "head"}, {"lengths_k": [2, 0, 40, 140], "bias": "key"}],
    ids=["plain", "generative", "cross"],
)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_column_sums_and_deletion_effects(make_problem, options, dtype, head_dim):
    """Against plain torch in float64, which tests/ops/test_keys.py compares with whole matrices."""
    problem = make_problem([1, 3, 150, 66], n_heads=1, head_dim=head_dim, dtype=dtype, **options)
    bounds = machine.bounds_of(problem.q, problem.k, problem.cu_seqlens, **problem.options)
    q, k, v, grad = (tensor.double() for tensor in (problem.q, problem.k, problem.v, problem.grad_out))
    out, lse = oracle.attention(q, k, v, problem.cu_seqlens, **problem.options)
    sums = machine.operators().attention_column_sums(problem.q, problem.k, lse.float(), *bounds)
    torch.testing.assert_close(
        sums.double(), reference.column_sums(q, k, OperatorOptions(*bounds)), rtol=1e-5, atol=1e-5
    )
    # The rounded output stands in for the exact one on both sides, as it does in a model.
    out = out.to(dtype)
    effects = machine.operators().attention_deletion_effects(
        problem.grad_out, problem.q, problem.k, problem.v, out, lse.float(), *bounds
    )
    expected = reference.deletion_effects(grad, q, k, v, OperatorOptions(*bounds), out=out.double())
    torch.testing.assert_close(effects.double(), expected, rtol=1e-4, atol=1e-4)


@EMULATED_ONLY
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(make_problem, grad):
    problem = make_problem([9, 0, 40], dtype=torch.bfloat16, known=[3, 0, 40], bias="head")
    tensors = [tensor.requires_grad_(grad) for tensor in (problem.q, problem.k, problem.v)]
    bounds = machine.bounds_of(problem.q, problem.k, problem.cu_seqlens, **problem.options)
    torch.library.opcheck(machine.operators().attention_forward.default, (*tensors, *bounds))


@EMULATED_ONLY
def test_deterministic_algorithms_take_the_deterministic_form(make_problem, deterministic):
    problem = make_problem([40], dtype=torch.bfloat16)
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        problem.run(machine.attention)
    name = "attention_backward_deterministic" if deterministic else "attention_backward"
    assert [call for call in called if "attention_backward" in call] == [f"scfm_emulated.{name}.default"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 2, 48)}, "`q` and `q` differ|support bfloat16"),
        ({"q": torch.zeros(6, 2, 48).half()}, "head width is 48; the CUDA kernels support 32, 64 and 128"),
        ({"k": torch.zeros(6, 1, 32).half()}, "`k` has shape"),
        ({"k": torch.zeros(6, 2, 32).bfloat16()}, "differ in dtype"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "ends at 7"),
        ({"cu_seqlens": torch.tensor([0, 9, 6])}, "decreases from 9 to 6"),
        ({"n_known": torch.tensor([7, 0])}, "`n_known` is 7"),
        ({"key_bias": torch.zeros(5, 2)}, "`key_bias` must be float32"),
    ],
)
def test_the_operator_refuses_what_would_read_out_of_bounds(change, message):
    q = change.get("q", torch.zeros(6, 2, 32).half())
    call = {"q": q, "k": q, "v": q, "cu_seqlens": torch.tensor([0, 2, 6]), "cu_seqlens_k": None, "n_known": None}
    call |= {"key_bias": None, "scale": 1.0} | change
    with pytest.raises(RuntimeError, match=message):
        machine.operators().attention_forward(*call.values())


@EMULATED_ONLY
def test_tiles_hold_every_row_once_and_long_walks_come_first():
    lengths, known = torch.tensor([0, 1, 128, 129, 300]), torch.tensor([0, 0, 128, 5, 200])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    q = torch.zeros(int(cu_seqlens[-1]), 1, 32)
    table = machine.operators().tiles(q, cu_seqlens, None, known)
    for side, rows_of_cell, walk_of_cell in ((0, lengths, known), (1, known, lengths)):
        tiles = table[table[:, 7] == side]
        rows = torch.cat([torch.arange(begin, begin + count) for begin, count, *_ in tiles.tolist()])
        expected = torch.cat([cu_seqlens[cell] + torch.arange(n) for cell, n in enumerate(rows_of_cell.tolist())])
        assert rows.sort().values.tolist() == expected.tolist()
        assert tiles[:, 1].max() == 128
        assert torch.equal(tiles[:, 3], walk_of_cell[tiles[:, 5].long()].int())
        assert torch.equal(tiles[:, 3], tiles[:, 3].sort(descending=True).values)
        for begin, count, _, _, own, cell, *_ in tiles.tolist():
            first_unknown = int(cu_seqlens[cell] + known[cell])
            assert begin + own == min(max(first_unknown, begin), begin + count)
