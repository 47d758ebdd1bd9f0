"""A linear layer whose rows do not depend on each other."""

# Axes: N rows, D inputs, E outputs.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# bfloat16 weights are packed anew for every product, which only long blocks pay back: at 16,384 rows on two cores, blocks of
# 512 take 2 to 3 times as long as one product, blocks of 2,048 1.3 times; in float32 512 costs 5 to 10 %.
ROW_BLOCK = {torch.float32: 512, torch.float64: 512, torch.bfloat16: 2048, torch.float16: 2048}


class Linear(nn.Linear):
    """`torch.nn.Linear`, with bitwise the same row whatever the other rows are, at inference on the CPU.

    A matrix product picks its kernel, and so the order of its sums, by the shape of the whole matrix: measured
    on an AVX-512 machine, a row of a float32 product comes out differently below 16 to 60 rows, one of a bfloat16
    product almost anywhere. Without gradients the rows are therefore multiplied in blocks of one fixed shape, the last one filled up with
    zeros: a cell's embedding then cannot depend on its batch-mates. Training keeps torch's own product.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the parent class
        return linear(input, self.weight, self.bias)


def linear(input_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Compute `torch.nn.functional.linear`, in row blocks at inference on the CPU; see `Linear`."""
    if input_ND.device.type != "cpu" or torch.is_grad_enabled() or input_ND.dim() != 2:
        return F.linear(input_ND, weight_ED, bias_E)
    return _linear_in_row_blocks(input_ND, weight_ED, bias_E)


def _linear_in_row_blocks(input_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        input_ND, weight_ED = input_ND.to(dtype), weight_ED.to(dtype)
        bias_E = None if bias_E is None else bias_E.to(dtype)
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
