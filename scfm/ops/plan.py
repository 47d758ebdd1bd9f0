"""`AttentionPlan`: the boundaries of a batch, checked once and used by every layer."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scfm.ops.layout import Layout, lay_out


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPlan:
    """Checked boundaries of one batch; built once per batch, so that no layer synchronizes with the device.

    Attributes
    ----------
    cu_seqlens
        Boundaries of the queries, shape (B + 1,), int64, on the host.
    cu_seqlens_k
        Boundaries of the keys for cross-attention, shape (B + 1,), int64, on the host; None for self-attention.
    n_known
        Number of leading context tokens of each cell, shape (B,), int64, on the host; None if all tokens are context.
    layout
        The same in the form that torch's GPU kernels need, in one tensor. Made by `to`, or earlier by `laid_out`. None on a
        CPU.

    Examples
    --------
    >>> import torch, scfm
    >>> plan = scfm.ops.make_plan(torch.tensor([0, 3, 5]), n_known=torch.tensor([2, 2]))
    >>> plan.cu_seqlens.tolist(), plan.n_known.tolist()
    ([0, 3, 5], [2, 2])
    """

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None = None
    n_known: Tensor | None = None
    layout: Layout | None = None

    @property
    def n_cells(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def laid_out(self) -> AttentionPlan:
        """Return the plan with its layout, on the host. A loader can call this before the training step."""
        return replace(self, layout=self.layout or lay_out(self.cu_seqlens, self.cu_seqlens_k, self.n_known))

    def pin_memory(self) -> AttentionPlan:
        """Return the plan with its layout in pinned memory, from which copies to a GPU are asynchronous."""
        layout = self.laid_out().layout
        assert layout is not None
        return replace(self, layout=layout.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AttentionPlan:
        """Return the plan for tensors on `device`. For a GPU, the layout is copied to it; the boundaries stay on the host."""
        device = torch.device(device)
        if device.type != "cuda":
            return replace(self, layout=None)
        layout = self.laid_out().layout
        assert layout is not None
        return replace(self, layout=layout.to(device, non_blocking=non_blocking))


def make_plan(
    cu_seqlens: Tensor,
    *,
    n_known: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    n_tokens: int | None = None,
    n_tokens_k: int | None = None,
) -> AttentionPlan:
    """Check the boundaries of a batch and copy them to the host.

    Parameters
    ----------
    cu_seqlens
        Cell boundaries of the queries, shape (B + 1,), int32 or int64, first 0, never decreasing.
    n_known
        Number of leading context tokens of each cell, shape (B,), int32 or int64, from 0 to the cell's length.
        Self-attention only.
    cu_seqlens_k
        Boundaries of the keys, shape (B + 1,), for cross-attention.
    n_tokens, n_tokens_k
        If given, the numbers that the boundaries must end at.

    Raises
    ------
    TypeError
        If a tensor does not hold int32 or int64.
    ValueError
        If boundaries do not start at 0, decrease, or do not end at the number of tokens; if shapes do not fit; or if
        `n_known` is outside a cell.

    Examples
    --------
    >>> import torch, scfm
    >>> cu_seqlens = torch.tensor([0, 3, 5])
    >>> plan = scfm.ops.make_plan(cu_seqlens)  # once per batch, for all layers
    >>> q = torch.randn(5, 2, 8)
    >>> scfm.ops.attention(q, q, q, cu_seqlens, plan=plan).shape
    torch.Size([5, 2, 8])
    """
    bounds = _host_boundaries("cu_seqlens", cu_seqlens, n_tokens)
    bounds_k = None
    if cu_seqlens_k is not None:
        bounds_k = _host_boundaries("cu_seqlens_k", cu_seqlens_k, n_tokens_k)
        if bounds_k.shape != bounds.shape:
            raise ValueError(
                f"`cu_seqlens_k` has {bounds_k.shape[0]} entries and `cu_seqlens` {bounds.shape[0]}; both need one "
                "more than there are cells. A cell without keys has two equal boundaries."
            )
    elif n_tokens_k is not None and n_tokens_k != n_tokens:
        raise ValueError(
            f"`q` has {n_tokens} tokens and `k` {n_tokens_k}; without `cu_seqlens_k` they must be the same. "
            "Pass `cu_seqlens_k` for cross-attention."
        )
    known = None
    if n_known is not None:
        if bounds_k is not None:
            raise ValueError(
                "`n_known` and `cu_seqlens_k` were both given, but the generative mask lets a query attend to its own key "
                "and so needs self-attention. Drop one of the two."
            )
        known = _host_n_known(n_known, bounds)
    return AttentionPlan(cu_seqlens=bounds, cu_seqlens_k=bounds_k, n_known=known)


def _host_integers(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` is a {type(tensor).__name__}; pass a torch tensor of int32 or int64.")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` holds {tensor.dtype}; pass int32 or int64.")
    if tensor.dim() != 1:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; it must have one axis.")
    return tensor.detach().to(device="cpu", dtype=torch.int64)


def _host_boundaries(name: str, boundaries: Tensor, n_tokens: int | None) -> Tensor:
    bounds = _host_integers(name, boundaries)
    if bounds.shape[0] == 0:
        raise ValueError(f"`{name}` is empty; it needs one more entry than there are cells, the first 0.")
    first, last = int(bounds[0]), int(bounds[-1])
    if first != 0:
        raise ValueError(f"`{name}` starts at {first}; it must start at 0.")
    lengths_B = bounds.diff()
    if lengths_B.numel() and int(lengths_B.min()) < 0:
        cell = int(lengths_B.argmin())
        raise ValueError(
            f"`{name}` decreases from {int(bounds[cell])} to {int(bounds[cell + 1])} at cell {cell}; "
            "boundaries must not decrease."
        )
    if n_tokens is not None and last != n_tokens:
        raise ValueError(f"`{name}` ends at {last}, but there are {n_tokens} tokens; it must end at their number.")
    return bounds


def _host_n_known(n_known: Tensor, bounds: Tensor) -> Tensor:
    known = _host_integers("n_known", n_known)
    n_cells = bounds.shape[0] - 1
    if known.shape[0] != n_cells:
        raise ValueError(f"`n_known` has {known.shape[0]} entries for {n_cells} cells; it needs one per cell.")
    lengths_B = bounds.diff()
    outside = ((known < 0) | (known > lengths_B)).nonzero()
    if outside.numel():
        cell = int(outside[0])
        raise ValueError(
            f"`n_known` is {int(known[cell])} for cell {cell} of {int(lengths_B[cell])} tokens; it must be from 0 to "
            "the number of tokens."
        )
    return known
