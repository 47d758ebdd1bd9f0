"""Cross-entropy over a large vocabulary, without all logits in memory at once."""

# Axes: N rows, D width, V classes.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scfm.ops.cross_entropy import cross_entropy_gradient
from scfm.ops.linear import has_slow_bfloat16, linear

ROWS_AT_A_TIME = 512  # 52 MB of float32 logits for 25,426 genes; fewer rows mean more updates of the weight gradient


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor) -> Tensor:
    """Return the sum over rows of the cross-entropy of `hidden @ weight.T + bias` with `target`, a float32 scalar.

    The result is that of `torch.nn.functional.cross_entropy` on the logits. Logits are computed for some rows at a time;
    their softmax and gradients are computed at once, and only the gradients are kept. This saves N x V numbers of memory
    and does not compute any product twice. Softmax and sums are in float32, products in the dtype of autocast.

    Parameters
    ----------
    hidden_ND
        Rows to classify, shape (N, D).
    weight_VD, bias_V
        The linear layer, shapes (V, D) and (V,).
    target_N
        Class of each row, shape (N,), int64.

    Notes
    -----
    The method is that of Liger Kernel (Hsu et al. 2024). Cut cross-entropy (Wijmans et al. 2024) recomputes the logits instead.
    On an x86 CPU without bfloat16 instructions, operands are rounded to bfloat16 and multiplied in float32, because torch
    emulates the product of bfloat16 matrices at a fiftieth of the speed.
    """
    if not torch.is_grad_enabled():
        parts = zip(hidden_ND.split(ROWS_AT_A_TIME), target_N.split(ROWS_AT_A_TIME))
        losses = [F.cross_entropy(linear(h, weight_VD, bias_V).float(), t, reduction="sum") for h, t in parts]
        return torch.stack(losses).sum() if losses else hidden_ND.new_zeros((), dtype=torch.float32)
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    weight_VD = weight_VD.to(hidden_ND.dtype)
    if device == "cpu" and hidden_ND.dtype == torch.bfloat16 and has_slow_bfloat16():
        hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, target_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor) -> Tensor:
        n_rows, is_low = hidden_ND.shape[0], hidden_ND.dtype != torch.float32
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        loss = torch.zeros((), device=hidden_ND.device)
        # Memory is reused for all parts, because the system would set new memory to zero each time.
        logits_NV = _empty_logits(hidden_ND, min(ROWS_AT_A_TIME, n_rows), weight_VD.shape[0])
        product_VD = torch.empty_like(weight_VD) if is_low else None
        for start in range(0, n_rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            grad_NV = torch.mm(hidden_ND[rows], weight_VD.T, out=logits_NV[: n_rows - start])
            loss_N, of_bias_V = cross_entropy_gradient(grad_NV, bias_V.float(), target_N[rows])
            loss += loss_N.sum()
            grad_bias_V += of_bias_V
            torch.mm(grad_NV, weight_VD, out=grad_hidden_ND[rows])
            if product_VD is None:
                grad_weight_VD.addmm_(grad_NV.T, hidden_ND[rows])
            else:
                grad_weight_VD += torch.mm(grad_NV.T, hidden_ND[rows], out=product_VD)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = weight_VD.dtype, bias_V.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # In place, because the gradients are used once; torch raises an error if a second backward pass needs them.
        of_hidden_ND, of_weight_VD, of_bias_V = (saved.mul_(grad[0]) for saved in ctx.saved_tensors)
        weight_dtype, bias_dtype = ctx.dtypes
        return of_hidden_ND, of_weight_VD.to(weight_dtype), of_bias_V.to(bias_dtype), None


def _empty_logits(hidden_ND: Tensor, n_rows: int, n_classes: int) -> Tensor:
    """Return memory for logits, shape (N, V).

    In float32 rows start at multiples of 256 bytes: for 25,426 classes, MKL's products with unaligned rows take 1.4 times as long.
    """
    n_columns = n_classes if hidden_ND.dtype != torch.float32 else -(-n_classes // 64) * 64
    return hidden_ND.new_empty(n_rows, n_columns)[:, :n_classes]
