"""`linear`: rows times a weight matrix, with each row bitwise independent of the others."""

# Axes: N rows, D inputs, E outputs.

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scfm.ops.backend import EXTENSION_PATH, FUSED_DTYPES
from scfm.ops.options import has_tangent, readable

# Rows per product without the compiled kernel. torch packs bfloat16 weights again for every product: at 16,384 rows on two
# cores, blocks of 512 rows take 2 to 3 times as long as one product, blocks of 2,048 1.3 times. In float32 blocks of 512
# cost 5 to 10 %.
ROW_BLOCK = {torch.float32: 512, torch.float64: 512, torch.bfloat16: 2048, torch.float16: 2048}


def linear(
    input_ND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None = None,
    *,
    relu: bool = False,
    residual_NE: Tensor | None = None,
) -> Tensor:
    """`residual + relu(input weight^T + bias)`; at inference on the CPU each row is bitwise independent of the others.

    Parameters
    ----------
    input_ND, weight_ED, bias_E
        As for `torch.nn.functional.linear`: shapes (N, D), (E, D) and (E,), of one dtype. Under autocast they are cast as
        torch casts them.
    relu
        Whether negative products become 0 before the residual is added.
    residual_NE
        Added to the result, shape (N, E); nothing by default.

    Returns
    -------
    Tensor of shape (N, E), in the dtype of the input. An input with another number of dimensions, (..., D), or of a dtype that
    is not real floating point, is multiplied by torch, and its rows are then not independent.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit, as torch raises it.

    Notes
    -----
    The matrix products of libraries choose a kernel, and with it the order of sums, by the shape of the matrix. On an AVX-512
    machine, the result of a row in float32 changed if the matrix had fewer than 16 to 60 rows, and in bfloat16 for almost every
    number of rows. Without gradients the compiled kernel is used instead, whose sums have a fixed order. If it is not built,
    rows are multiplied in blocks of a fixed shape, the last of which is padded with zeros. Training uses torch's product.

    Examples
    --------
    >>> import torch, scfm
    >>> rows_ND, weight_ED = torch.randn(300, 64), torch.randn(32, 64)
    >>> with torch.inference_mode():
    ...     torch.equal(scfm.ops.linear(rows_ND, weight_ED)[:1], scfm.ops.linear(rows_ND[:1], weight_ED))
    True
    """
    by_rows = input_ND.device.type == "cpu" and input_ND.dim() == 2 and input_ND.dtype in ROW_BLOCK
    if not by_rows or torch.is_grad_enabled() or has_tangent(input_ND, weight_ED, bias_E, residual_NE):
        return _finished(_product(input_ND, weight_ED, bias_E), relu, residual_NE)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        input_ND, weight_ED = input_ND.to(dtype), weight_ED.to(dtype)
        bias_E = None if bias_E is None else bias_E.to(dtype)
    if EXTENSION_PATH is None or input_ND.dtype not in FUSED_DTYPES:
        return _finished(_linear_in_row_blocks(input_ND, weight_ED, bias_E), relu, residual_NE)
    input_ND, weight_ED = readable(input_ND), readable(weight_ED)
    if residual_NE is None or residual_NE.dtype == input_ND.dtype:
        residual_NE = None if residual_NE is None else readable(residual_NE)
        return torch.ops.scfm.linear(input_ND, weight_ED, bias_E, residual_NE, relu)
    return residual_NE + torch.ops.scfm.linear(input_ND, weight_ED, bias_E, None, relu)


# Found out at import: torch.compile cannot trace the question.
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_MULTIPLIES_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_slow_bfloat16() -> bool:
    """Whether this is an x86 CPU without bfloat16 instructions."""
    return _IS_X86 and not _MULTIPLIES_BFLOAT16


def _product(input_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Torch's product; a bfloat16 one by way of float32 if the CPU has no bfloat16 instructions.

    torch emulates them: on AVX2 its product of (2,048, 768) and (768, 3,072) with gradients takes 15 s, and 0.3 s by way of
    float32. The result is that of sums in float32, rounded once, and so are the gradients.
    """
    if input_ND.device.type != "cpu" or not has_slow_bfloat16():
        return F.linear(input_ND, weight_ED, bias_E)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input_ND.dtype
    if dtype != torch.bfloat16:
        return F.linear(input_ND, weight_ED, bias_E)
    with torch.autocast("cpu", enabled=False):
        bias_E = None if bias_E is None else bias_E.float()
        return F.linear(input_ND.float(), weight_ED.float(), bias_E).to(dtype)


def _finished(output_NE: Tensor, relu: bool, residual_NE: Tensor | None) -> Tensor:
    if relu:
        output_NE = F.relu(output_NE) if torch.is_grad_enabled() else F.relu_(output_NE)
    return output_NE if residual_NE is None else residual_NE + output_NE


def _linear_in_row_blocks(input_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    n_rows, block = input_ND.shape[0], ROW_BLOCK[input_ND.dtype]
    output_NE = input_ND.new_empty(n_rows, weight_ED.shape[0])
    for start in range(0, n_rows, block):
        rows_ND = input_ND[start : start + block]
        n_filled = rows_ND.shape[0]
        if n_filled == block:
            _multiply(rows_ND, weight_ED, bias_E, output_NE[start : start + block])
        else:
            filled_NE = input_ND.new_empty(block, weight_ED.shape[0])
            _multiply(F.pad(rows_ND, (0, 0, 0, block - n_filled)), weight_ED, bias_E, filled_NE)
            output_NE[start:] = filled_NE[:n_filled]
    return output_NE


def _multiply(rows_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, out_NE: Tensor) -> None:
    if bias_E is None:
        torch.mm(rows_ND, weight_ED.T, out=out_NE)
    else:
        torch.addmm(bias_E, rows_ND, weight_ED.T, out=out_NE)


def _fake_linear(input_ND: Tensor, weight_ED: Tensor, *_: Any) -> Tensor:
    return input_ND.new_empty(input_ND.shape[0], weight_ED.shape[0])


if EXTENSION_PATH is not None:
    torch.library.register_fake("scfm::linear", _fake_linear)
