"""Cross-entropy over a large vocabulary, without all logits in memory at once."""

# Axes: N rows, D width, V classes.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """
    if not torch.is_grad_enabled():
        parts = zip(hidden_ND.split(ROWS_AT_A_TIME), target_N.split(ROWS_AT_A_TIME))
        losses = [F.cross_entropy(F.linear(h, weight_VD, bias_V).float(), t, reduction="sum") for h, t in parts]
        return torch.stack(losses).sum() if losses else hidden_ND.new_zeros((), dtype=torch.float32)
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD.to(hidden_ND.dtype), bias_V, target_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor) -> Tensor:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        loss = torch.zeros((), device=hidden_ND.device)
        buffers = _Buffers(hidden_ND, weight_VD)
        for start in range(0, hidden_ND.shape[0], ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            grad_NV, summed = _logits_gradient(buffers, hidden_ND[rows], weight_VD, bias_V, target_N[rows, None])
            loss += summed
            grad_bias_V += grad_NV.sum(0)
            grad_NV = buffers.in_low_precision(grad_NV)
            torch.mm(grad_NV, weight_VD, out=grad_hidden_ND[rows])
            if buffers.product_VD is None:
                grad_weight_VD.addmm_(grad_NV.T, hidden_ND[rows])
            else:
                grad_weight_VD += torch.mm(grad_NV.T, hidden_ND[rows], out=buffers.product_VD)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = weight_VD.dtype, bias_V.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # In place, because the gradients are used once; torch raises an error if a second backward pass needs them.
        of_hidden_ND, of_weight_VD, of_bias_V = (saved.mul_(grad[0]) for saved in ctx.saved_tensors)
        weight_dtype, bias_dtype = ctx.dtypes
        return of_hidden_ND, of_weight_VD.to(weight_dtype), of_bias_V.to(bias_dtype), None


class _Buffers:
    """Memory that is reused for all parts, because new memory would be set to zero by the system each time."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor) -> None:
        shape = (min(ROWS_AT_A_TIME, hidden_ND.shape[0]), weight_VD.shape[0])
        self.is_low = hidden_ND.dtype != torch.float32
        self.low_NV = hidden_ND.new_empty(shape) if self.is_low else None
        self.product_VD = torch.empty_like(weight_VD) if self.is_low else None
        self.logits_NV, self.grad_NV = hidden_ND.new_empty((2, *shape), dtype=torch.float32)

    def in_low_precision(self, tensor_NV: Tensor) -> Tensor:
        return tensor_NV if self.low_NV is None else self.low_NV[: len(tensor_NV)].copy_(tensor_NV)


def _logits_gradient(
    buffers: _Buffers, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient with respect to the logits of some rows, softmax minus one-hot, (N, V), and their summed loss."""
    n_rows = len(hidden_ND)
    logits_NV, grad_NV = buffers.logits_NV[:n_rows], buffers.grad_NV[:n_rows]
    product_NV = logits_NV if buffers.low_NV is None else buffers.low_NV[:n_rows]
    torch.addmm(bias_V.to(hidden_ND.dtype), hidden_ND, weight_VD.T, out=product_NV)
    torch.log_softmax(logits_NV.copy_(product_NV) if buffers.is_low else logits_NV, 1, out=grad_NV)
    summed = -grad_NV.gather(1, target_N1).sum()
    return grad_NV.exp_().scatter_add_(1, target_N1, torch.full_like(target_N1, -1, dtype=torch.float32)), summed
