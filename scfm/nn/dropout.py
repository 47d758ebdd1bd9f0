"""Dropout whose cost on the CPU is proportional to the number of dropped elements."""

# Axes: M elements of a tensor, N dropped ones.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(tensor: Tensor, p: float, training: bool) -> Tensor:
    """Set each element to zero with probability `p`, and multiply the others by 1 / (1 - p).

    On the CPU, `torch.nn.functional.dropout` draws one random number per element, and keeps a float32 mask for the
    backward pass. Here the gaps between dropped elements are drawn, and the indices of these elements are kept. The
    distribution is the same, and random numbers and memory are reduced to a fraction `p`. Random numbers come from torch's
    default generator, in an order that does not depend on the number of threads.
    """
    if not training or p == 0:
        return tensor
    if tensor.device.type != "cpu":
        return F.dropout(tensor, p, training=True)
    return _Dropout.apply(tensor, dropped_indices(tensor.numel(), p), 1 / (1 - p))


def add_dropped(residual: Tensor, tensor: Tensor, p: float, training: bool) -> Tensor:
    """Compute `residual + dropout(tensor)`, on the CPU in one pass."""
    if not training or p == 0 or tensor.device.type != "cpu":
        return residual + dropout(tensor, p, training)
    return _AddDropped.apply(residual, tensor, dropped_indices(tensor.numel(), p), 1 / (1 - p))


def dropped_indices(n_elements: int, p: float) -> Tensor:
    """Draw each of `n_elements` with probability `p`, and return the indices of the drawn ones, ascending, shape (N,), int64.

    Gaps between consecutive indices have a geometric distribution, P(gap = k) = (1 - p)^(k - 1) p, and are drawn as
    floor(log u / log(1 - p)) + 1.
    """
    expected = n_elements * p
    n_draws = int(expected + 6 * math.sqrt(expected)) + 16  # too few only once in a billion times
    parts, last = [], -1
    while last < n_elements:
        u_N = 1 - torch.rand(n_draws, dtype=torch.float64)  # in (0, 1]
        index_N = u_N.log_().mul_(1 / math.log1p(-p)).floor_().add_(1).cumsum_(0).to(torch.int64).add_(last)
        parts.append(index_N)
        last = int(index_N[-1])
    index_N = parts[0] if len(parts) == 1 else torch.cat(parts)
    return index_N[: int(torch.searchsorted(index_N, n_elements))]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index_N: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.scale = scale
        return _scaled(tensor, index_N, scale)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (index_N,) = ctx.saved_tensors
        return _scaled(grad[0], index_N, ctx.scale), None, None


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, tensor: Tensor, index_N: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.scale, ctx.dtypes = scale, (residual.dtype, tensor.dtype)
        added = torch.add(residual, tensor, alpha=scale).contiguous()
        kept_N = residual.reshape(-1).index_select(0, index_N).to(added.dtype)
        added.view(-1).index_copy_(0, index_N, kept_N)
        return added

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (index_N,), (of_residual, of_tensor) = ctx.saved_tensors, ctx.dtypes
        return grad[0].to(of_residual), _scaled(grad[0].to(of_tensor), index_N, ctx.scale), None, None


def _scaled(tensor: Tensor, index_N: Tensor, scale: float) -> Tensor:
    scaled = torch.mul(tensor, scale).contiguous()
    scaled.view(-1).index_fill_(0, index_N, 0)
    return scaled
