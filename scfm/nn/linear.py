"""A linear layer whose rows do not depend on each other."""

# Axes: N rows, D inputs, E outputs.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROW_BLOCK = 512


class Linear(nn.Linear):
    """`torch.nn.Linear`, with bitwise the same row whatever the other rows are, at inference on the CPU.

    A matrix product picks its kernel, and so the order of its sums, by the shape of the whole matrix: measured
    on an AVX-512 machine, a row of a float32 product comes out differently below 16 to 60 rows, one of a bfloat16
    product almost anywhere. Without gradients the rows are therefore multiplied in blocks of one fixed shape, the last one filled up with
    zeros: a cell's embedding then cannot depend on its batch-mates. Training keeps torch's own product.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the parent class
        if input.device.type != "cpu" or torch.is_grad_enabled() or input.dim() != 2:
            return super().forward(input)
        return _linear_in_row_blocks(input, self.weight, self.bias)


def _linear_in_row_blocks(input_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        input_ND, weight_ED = input_ND.to(dtype), weight_ED.to(dtype)
        bias_E = None if bias_E is None else bias_E.to(dtype)
    n_rows = input_ND.shape[0]
    output_NE = input_ND.new_empty(n_rows, weight_ED.shape[0])
    for start in range(0, n_rows, ROW_BLOCK):
        block = input_ND[start : start + ROW_BLOCK]
        n_block = block.shape[0]
        if n_block < ROW_BLOCK:
            block = F.pad(block, (0, 0, 0, ROW_BLOCK - n_block))
        output_NE[start : start + n_block] = F.linear(block, weight_ED, bias_E)[:n_block]
    return output_NE
