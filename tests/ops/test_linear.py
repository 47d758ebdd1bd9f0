"""Rows times a weight matrix: torch's values, and a row that is bitwise the same in any company."""

# Axes: N rows, D inputs, E outputs.

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from scfm import ops
from scfm.ops.linear import linear

HAS_KERNELS = ops.extension_info()["available"]
NEEDS_KERNELS = pytest.mark.skipif(not HAS_KERNELS, reason="needs the compiled extension")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 1, 40), (95, 33, 65), (97, 300, 31), (300, 512, 128), (0, 8, 8), (5, 8, 0), (5, 0, 40)]


def draw(n_rows, n_inputs, n_outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n_rows + n_inputs + n_outputs)

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


def check_accuracy(n_rows, n_inputs, n_outputs, dtype, *, relu, with_bias, with_residual):
    """The error against float64 is at most twice that of plain torch in the same dtype."""
    input_ND, weight_ED, bias_E, residual_NE = draw(n_rows, n_inputs, n_outputs, dtype)
    bias_E, residual_NE = bias_E if with_bias else None, residual_NE if with_residual else None
    with torch.inference_mode():
        found = linear(input_ND, weight_ED, bias_E, relu=relu, residual_NE=residual_NE)
        plain = by_definition(input_ND, weight_ED, bias_E, residual_NE, relu, dtype)
        exact = by_definition(input_ND, weight_ED, bias_E, residual_NE, relu, torch.float64)
    assert found.dtype == dtype
    assert found.shape == (n_rows, n_outputs)
    if found.numel() == 0:
        return
    error, torch_error = ((result.double() - exact).abs().max().item() for result in (found, plain))
    one_rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    assert error <= 2 * torch_error + one_rounding, (n_rows, n_inputs, n_outputs, dtype)


def check_every_shape():
    for dtype in DTYPES:
        for place, shape in enumerate(SHAPES):
            relu, with_bias, with_residual = bool(place & 1), bool(place & 2), bool(place & 4)
            check_accuracy(*shape, dtype, relu=relu, with_bias=with_bias, with_residual=with_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_errors_are_within_twice_those_of_torch(shape, dtype, relu, with_bias, with_residual):
    check_accuracy(*shape, dtype, relu=relu, with_bias=with_bias, with_residual=with_residual)


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(ops.extension_info()["isa"]):
        pytest.skip(f"this machine has no {isa}")
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        env={**os.environ, "SCFM_FORCE_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_bitwise_the_same_in_any_company(dtype):
    input_ND, weight_ED, bias_E, residual_NE = draw(2100, 130, 70, dtype)
    with torch.inference_mode():
        whole = linear(input_ND, weight_ED, bias_E, relu=True, residual_NE=residual_NE)
        for start, stop in ((0, 1), (3, 20), (90, 700), (2047, 2049), (2099, 2100)):
            part = linear(input_ND[start:stop], weight_ED, bias_E, relu=True, residual_NE=residual_NE[start:stop])
            assert torch.equal(part, whole[start:stop]), (start, stop)
        torch.set_num_threads(3 - min(torch.get_num_threads(), 2))
        other = linear(input_ND, weight_ED, bias_E, relu=True, residual_NE=residual_NE)
    assert torch.equal(other, whole)


def test_views_are_read_in_place():
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
    values = torch.cat([special, quiet])  # NaNs whose payload is in the low half, of either sign
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
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(3, 4, 5), "must be matrices"),
        (1, torch.zeros(6, 4), r"`weight` must be \(6, 5\)"),
        (1, torch.zeros(6, 5).bfloat16(), "`weight` must be"),
        (2, torch.zeros(5), r"`bias` must be \(6\)"),
        (3, torch.zeros(4, 6), r"`residual` must be \(3, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(place, wrong, message):
    arguments = [torch.zeros(3, 5), torch.zeros(6, 5), torch.zeros(6), torch.zeros(3, 6)]
    arguments[place] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.scfm.linear(*arguments, False)


@NEEDS_KERNELS
def test_doubles_are_for_torch():
    input_ND, weight_ED, bias_E, residual_NE = draw(30, 20, 12, torch.float64)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        torch.ops.scfm.linear(input_ND, weight_ED, bias_E, residual_NE, False)
    check_accuracy(30, 20, 12, torch.float64, relu=True, with_bias=True, with_residual=True)


if __name__ == "__main__":
    check_every_shape()
    sys.stdout.write(json.dumps(ops.extension_info()["isa"]))
