"""Dropout whose cost on the CPU goes with what is dropped, not with what is kept."""

# Axes: M elements of a tensor, N dropped ones.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(tensor: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`: zero each element with probability `p`, and scale the others by 1 / (1 - p).

    On the CPU torch draws a random number an element, and keeps a mask in float32 for the backward pass. Here the gaps
    between dropped elements are drawn, and their places kept: the same distribution, exactly `p`, for a share `p` of the
    draws and of the memory. Randomness comes from torch's default generator, in an order that does not depend on the number of threads.
    """
    if not training or p == 0:
        return tensor
    if tensor.device.type != "cpu":
        return F.dropout(tensor, p, training=True)
    return _Dropout.apply(tensor, dropped_places(tensor.numel(), p), 1 / (1 - p))


def add_dropped(residual: Tensor, tensor: Tensor, p: float, training: bool) -> Tensor:
    """Compute `residual + dropout(tensor)`, in one pass over both on the CPU."""
    if not training or p == 0 or tensor.device.type != "cpu":
        return residual + dropout(tensor, p, training)
    return _AddDropped.apply(residual, tensor, dropped_places(tensor.numel(), p), 1 / (1 - p))


def dropped_places(n_elements: int, p: float) -> Tensor:
    """Draw each of `n_elements` with probability `p`; the places of those drawn, ascending, shape (N,), int64.

    The gap from one to the next is geometric: P(gap = k) = (1 - p)^(k - 1) p, drawn as floor(log u / log(1 - p)) + 1.
    """
    expected = n_elements * p
    n_draws = int(expected + 6 * math.sqrt(expected)) + 16  # enough, but once in a billion times
    parts, last = [], -1
    while last < n_elements:
        u_N = 1 - torch.rand(n_draws, dtype=torch.float64)  # in (0, 1]
        places_N = u_N.log_().mul_(1 / math.log1p(-p)).floor_().add_(1).cumsum_(0).to(torch.int64).add_(last)
        parts.append(places_N)
        last = int(places_N[-1])
    places_N = parts[0] if len(parts) == 1 else torch.cat(parts)
    return places_N[: int(torch.searchsorted(places_N, n_elements))]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places_N: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.scale = scale
        return _scaled(tensor, places_N, scale)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (places_N,) = ctx.saved_tensors
        return _scaled(grad[0], places_N, ctx.scale), None, None


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, tensor: Tensor, places_N: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.scale, ctx.dtypes = scale, (residual.dtype, tensor.dtype)
        added = torch.add(residual, tensor, alpha=scale).contiguous()
        kept_N = residual.reshape(-1).index_select(0, places_N).to(added.dtype)
        added.view(-1).index_copy_(0, places_N, kept_N)
        return added

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (places_N,), (of_residual, of_tensor) = ctx.saved_tensors, ctx.dtypes
        return grad[0].to(of_residual), _scaled(grad[0].to(of_tensor), places_N, ctx.scale), None, None


def _scaled(tensor: Tensor, places_N: Tensor, scale: float) -> Tensor:
    scaled = torch.mul(tensor, scale).contiguous()
    scaled.view(-1).index_fill_(0, places_N, 0)
    return scaled
