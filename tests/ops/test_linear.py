"""Rows times a weight matrix: the same values as torch, and rows that are bitwise independent of each other."""

# Axes: N rows, D inputs, E outputs.

import sys

import accuracy
import pytest
import torch
from torch.nn import functional as F

from scfm import ops
from scfm.ops.linear import linear

HAS_KERNELS = ops.extension_info()["available"]
NEEDS_KERNELS = pytest.mark.skipif(not HAS_KERNELS, reason="needs the compiled extension")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 1, 40), (95, 33, 65), (97, 300, 31), (300, 512, 128), (0, 8, 8), (5, 8, 0), (5, 0, 40)]


def draw(n_rows, n_inputs, n_outputs, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + n_rows + n_inputs + n_outputs)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight_ED = normal(n_outputs, n_inputs) / n_inputs**0.5
    return normal(n_rows, n_inputs), weight_ED, normal(n_outputs), normal(n_rows, n_outputs)


def by_definition(input_ND, weight_ED, bias_E, residual_NE, relu, dtype):
    """The result from sums in `dtype`, rounded once at the end where that is float64."""
    tensors = (None if t is None else t.to(dtype) for t in (input_ND, weight_ED, bias_E, residual_NE))
    input_ND, weight_ED, bias_E, residual_NE = tensors
    result = F.linear(input_ND, weight_ED, bias_E)
    result = F.relu(result) if relu else result
    return result if residual_NE is None else residual_NE + result


def results(n_rows, n_inputs, n_outputs, dtype, *, relu, with_bias, with_residual, seed):
    """The result of `linear`, of plain torch, the exact one, and the bound on the error of the first."""
    input_ND, weight_ED, bias_E, residual_NE = draw(n_rows, n_inputs, n_outputs, dtype, seed)
    bias_E, residual_NE = bias_E if with_bias else None, residual_NE if with_residual else None
    with torch.inference_mode():
        found = linear(input_ND, weight_ED, bias_E, relu=relu, residual_NE=residual_NE)
        plain = by_definition(input_ND, weight_ED, bias_E, residual_NE, relu, dtype)
        exact = by_definition(input_ND, weight_ED, bias_E, residual_NE, relu, torch.float64)
        sizes = (None if t is None else t.abs() for t in (input_ND, weight_ED, bias_E, residual_NE))
        size_NE = by_definition(*sizes, False, torch.float64)
    assert found.dtype == dtype
    assert found.shape == (n_rows, n_outputs)
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    rounded_NE = exact.abs()
    if residual_NE is not None and not HAS_KERNELS:  # plain torch rounds the product, and then the sum
        rounded_NE = rounded_NE + (exact - residual_NE.double()).abs()
    bound = 1.1 * ((n_inputs + 4) * unit * size_NE + torch.finfo(dtype).eps * rounded_NE) + torch.finfo(dtype).tiny
    return found, plain, exact, bound


def check_accuracy(*shape, dtype, **options):
    draws = [results(*shape, dtype, seed=seed, **options) for seed in range(8)]
    for found, _, exact, bound in draws:
        assert (accuracy.error(found, exact).abs() <= bound).all()
    if draws[0][0].numel():
        found, plain, exact = ([one[part] for one in draws] for part in range(3))
        accuracy.check(found, exact, accuracy.root_mean_square_error(plain, exact), (shape, dtype))


def check_every_shape():
    for dtype in DTYPES:
        for number, shape in enumerate(SHAPES):
            relu, with_bias, with_residual = bool(number & 1), bool(number & 2), bool(number & 4)
            check_accuracy(*shape, dtype=dtype, relu=relu, with_bias=with_bias, with_residual=with_residual)
    check_growth()


def check_growth():
    """One chain of additions would be sqrt(32) times less exact over 4,096 inputs than over 128."""
    short, long = (
        [results(64, n, 64, torch.float32, relu=False, with_bias=False, with_residual=False, seed=s) for s in range(4)]
        for n in (128, 4096)
    )
    relative = [
        accuracy.root_mean_square_error([one[0] for one in draws], [one[2] for one in draws])
        / accuracy.root_mean_square([one[2] for one in draws])
        for draws in (short, long)
    ]
    assert relative[1] <= 1.5 * relative[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_errors_are_within_twice_those_of_torch(shape, dtype, relu, with_bias, with_residual):
    check_accuracy(*shape, dtype=dtype, relu=relu, with_bias=with_bias, with_residual=with_residual)


@NEEDS_KERNELS
def test_errors_do_not_grow_with_the_number_of_inputs():
    check_growth()


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", accuracy.ISAS)
def test_every_instruction_set(isa):
    """In a separate process, with torch limited to the same instruction set."""
    accuracy.run_with(isa, __file__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_bitwise_independent_of_the_others(dtype):
    input_ND, weight_ED, bias_E, residual_NE = draw(2100, 130, 70, dtype)
    with torch.inference_mode():
        whole = linear(input_ND, weight_ED, bias_E, relu=True, residual_NE=residual_NE)
        for start, stop in ((0, 1), (3, 20), (90, 700), (2047, 2049), (2099, 2100)):
            part = linear(input_ND[start:stop], weight_ED, bias_E, relu=True, residual_NE=residual_NE[start:stop])
            assert torch.equal(part, whole[start:stop]), (start, stop)
        torch.set_num_threads(3 - min(torch.get_num_threads(), 2))
        other = linear(input_ND, weight_ED, bias_E, relu=True, residual_NE=residual_NE)
    assert torch.equal(other, whole)


def test_views_are_read_without_a_copy():
    wide_ND, weight_ED, bias_E, residual_NE = draw(50, 96, 40)
    with torch.inference_mode():
        views = (wide_ND[:, 32:64], weight_ED[:, :32], bias_E, residual_NE.T.contiguous().T)
        copies = (view.contiguous() for view in views)
        found, expected = (linear(x, w, b, residual_NE=r) for x, w, b, r in (views, copies))
    assert torch.equal(found, expected)


def test_nan_and_infinity_come_through():
    input_ND, weight_ED, bias_E, residual_NE = draw(5, 20, 36)
    input_ND[1, 3], input_ND[2, 4] = torch.nan, torch.inf
    with torch.inference_mode():
        found = linear(input_ND, weight_ED, bias_E, relu=True, residual_NE=residual_NE)
    plain = by_definition(input_ND, weight_ED, bias_E, residual_NE, True, torch.float32)
    torch.testing.assert_close(found, plain, equal_nan=True)


def test_infinities_and_nans_of_every_kind_multiply_as_they_should():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.0, -1.0078125, 3e38, -1e-30])
    quiet = torch.tensor([0x7F800001, 0xFF801234 - 2**32], dtype=torch.int32).view(torch.float32)
    values = torch.cat([special, quiet])  # NaNs of both signs whose payload is in the lower half
    with torch.inference_mode():
        found = linear(values[:, None], values[:, None])
    expected = values[:, None] * values[None]
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_residual_of_another_dtype_is_added_as_torch_adds_it():
    input_ND, weight_ED, bias_E, residual_NE = draw(30, 16, 24)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = linear(input_ND, weight_ED, bias_E, residual_NE=residual_NE)
        expected = residual_NE + F.linear(input_ND, weight_ED, bias_E)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_gradients_in_training_are_those_of_torch():
    tensors = [tensor.requires_grad_() for tensor in draw(7, 5, 3)]
    input_ND, weight_ED, bias_E, residual_NE = tensors
    found = linear(input_ND, weight_ED, bias_E, relu=True, residual_NE=residual_NE)
    expected = residual_NE + F.relu(F.linear(input_ND, weight_ED, bias_E))
    for one, other in zip(torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)):
        torch.testing.assert_close(one, other)


@NEEDS_KERNELS
def test_opcheck():
    input_ND, weight_ED, bias_E, residual_NE = draw(9, 20, 12)
    torch.library.opcheck(torch.ops.scfm.linear.default, (input_ND, weight_ED, bias_E, residual_NE, True))
    torch.library.opcheck(torch.ops.scfm.linear.default, (input_ND, weight_ED, None, None, False))


@NEEDS_KERNELS
def test_a_compiled_layer_has_one_graph():
    input_ND, weight_ED, bias_E, _ = draw(9, 20, 12)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ND, weight_ED, bias_E), linear(input_ND, weight_ED, bias_E))


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, 4, 5), "must be matrices"),
        (1, torch.zeros(6, 4), r"`weight` must be \(6, 5\)"),
        (1, torch.zeros(6, 5).bfloat16(), "`weight` must be"),
        (2, torch.zeros(5), r"`bias` must be \(6\)"),
        (3, torch.zeros(4, 6), r"`residual` must be \(3, 6\)"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(position, wrong, message):
    arguments = [torch.zeros(3, 5), torch.zeros(6, 5), torch.zeros(6), torch.zeros(3, 6)]
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.scfm.linear(*arguments, False)


@NEEDS_KERNELS
def test_float64_uses_torch():
    input_ND, weight_ED, bias_E, residual_NE = draw(30, 20, 12, torch.float64)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        torch.ops.scfm.linear(input_ND, weight_ED, bias_E, residual_NE, False)
    check_accuracy(30, 20, 12, dtype=torch.float64, relu=True, with_bias=True, with_residual=True)


def test_dtypes_without_a_kernel_are_multiplied_by_torch():
    rows_ND, weight_ED = torch.arange(6).view(2, 3), torch.arange(12).view(4, 3)
    with torch.inference_mode():
        assert ops.linear(rows_ND, weight_ED).equal(F.linear(rows_ND, weight_ED))


if __name__ == "__main__":
    check_every_shape()
    sys.stdout.write(ops.extension_info()["isa"])


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_products_of_training_by_way_of_float32_are_as_exact_as_torchs(monkeypatch, autocast):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((37, 96), (64, 96), (64,))]
    upstream_NE = torch.randn(37, 64, generator=generator)

    def product_and_gradients(dtype, function):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            output_NE = function(*leaves)
        output_NE.backward(upstream_NE.to(output_NE.dtype))
        return [output_NE.detach(), *(leaf.grad for leaf in leaves)]

    given = torch.float32 if autocast else torch.bfloat16
    exact = product_and_gradients(torch.float64, F.linear)
    theirs = product_and_gradients(given, F.linear)
    monkeypatch.setattr(sys.modules["scfm.ops.linear"], "has_slow_bfloat16", lambda: True)
    ours = product_and_gradients(given, linear)
    for mine, peer, truth in zip(ours, theirs, exact):
        assert mine.dtype == peer.dtype
        assert (mine - truth).abs().max() <= 1.01 * (peer - truth).abs().max()


def test_no_rows_of_any_layout_give_no_rows():
    weight = torch.randn(5, 17)
    with torch.no_grad():
        for rows in (torch.randn(0, 17), torch.randn(17, 0).T, torch.randn(0, 17)[:, :1].expand(0, 17)):
            assert linear(rows, weight).shape == (0, 5)
