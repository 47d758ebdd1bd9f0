"""`Layout`: all indices of a batch that torch's own kernels on a GPU need, in one tensor that is copied once."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), U target tokens, S context tokens, N queries of cells without context.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_CELLS = 65_535  # maximum per launch: the limit of the second and third dimension of a CUDA grid
_EXTENTS = (
    "n_cells",
    "n_queries",
    "n_context",
    "n_target",
    "n_keyless",
    "longest_q",
    "longest_k",
    "has_mask",
    "is_cross",
)


@dataclass(frozen=True)
class Part:
    """The cells of one launch, at most `MAX_CELLS`. Its tensors are on the device.

    Attributes
    ----------
    queries, keys
        Slices of the rows of these cells among all queries, and among all context keys.
    cu_q, cu_k
        Boundaries of the cells, counted from the first row of the slice, shape (cells + 1,), int32.
    longest_q, longest_k
        Largest number of queries, and of context keys, of a cell of the batch.
    n_cells
        Number of cells.
    cell_T, position_T
        Cell of each query, counted from the first cell of the launch, and its position in the cell, shape (queries,), int64.
    """

    queries: slice
    keys: slice
    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    n_cells: int
    cell_T: Tensor
    position_T: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Indices of the cells, context keys and target tokens of a batch.

    Attributes
    ----------
    packed
        All sections, concatenated, int64, on the device.
    extents
        Lengths of the sections and other numbers, int64, on the host.
    is_target_T
        Whether a query attends also to its own key, shape (Tq,), bool. It is a separate field so that a traced graph does not
        need to read `extents`. None without the generative mask.
    """

    packed: Tensor
    extents: Tensor
    is_target_T: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Layout:
        return self._with(self.packed.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Layout:
        return self._with(self.packed.pin_memory())

    def _with(self, packed: Tensor) -> Layout:
        layout = replace(self, packed=packed)
        return replace(layout, is_target_T=layout.sections().is_target_T)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_self_attention(self) -> bool:
        """Whether keys and queries are the same tokens."""
        return not int(self.extents[_EXTENTS.index("is_cross")])

    def sections(self) -> Sections:
        """Views of the sections."""
        numbers = self.extents.tolist()
        n = dict(zip(_EXTENTS, numbers))
        n_queries, n_bytes = n["n_queries"], -(-n["n_queries"] // 8) * n["has_mask"]
        bounds, cell_T, position_T, is_target, context_S, target_U, keyless_N = self.packed.split(
            [n["n_cells"] + 1, n_queries, n_queries, n_bytes, n["n_context"], n["n_target"], n["n_keyless"]]
        )
        cu_q, cu_k = bounds.view(torch.int32).split(n["n_cells"] + 1)
        return Sections(
            cu_q=cu_q,
            cu_k=cu_k,
            cell_T=cell_T,
            position_T=position_T,
            is_target_T=is_target.view(torch.bool)[:n_queries] if n["has_mask"] else None,
            context_S=context_S if n["has_mask"] else None,
            target_U=target_U if n["has_mask"] else None,
            keyless_N=keyless_N if n["n_keyless"] else None,
            longest_q=n["longest_q"],
            longest_k=n["longest_k"],
            edges=list(zip(*[iter(numbers[len(_EXTENTS) :])] * 3)),
        )


@dataclass(frozen=True)
class Sections:
    """The sections of a layout, as tensors on the device."""

    cu_q: Tensor  # (B + 1,), int32
    cu_k: Tensor  # for the context keys, (B + 1,), int32
    cell_T: Tensor  # cell of each query
    position_T: Tensor  # position of each query in its cell
    is_target_T: Tensor | None  # bool; None without the generative mask
    context_S: Tensor | None  # token numbers of the context keys; None if these are all keys
    target_U: Tensor | None  # token numbers of the queries that attend also to their own key
    keyless_N: Tensor | None  # queries of cells without a context; None if there are none
    longest_q: int
    longest_k: int
    edges: list[tuple[int, ...]]  # first cell, query and context key of each launch; the last entry has their totals

    def parts(self) -> Iterator[Part]:
        """Divide the batch into launches of at most `MAX_CELLS` cells."""
        for (cell, query, key), (last_cell, last_query, last_key) in zip(self.edges, self.edges[1:]):
            cells, queries, keys = slice(cell, last_cell + 1), slice(query, last_query), slice(key, last_key)
            is_first = cell == 0
            yield Part(
                queries=queries,
                keys=keys,
                cu_q=self.cu_q[cells] if is_first else self.cu_q[cells] - query,
                cu_k=self.cu_k[cells] if is_first else self.cu_k[cells] - key,
                longest_q=self.longest_q,
                longest_k=self.longest_k,
                n_cells=last_cell - cell,
                cell_T=self.cell_T[queries] if is_first else self.cell_T[queries] - cell,
                position_T=self.position_T[queries],
            )


def lay_out(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, n_known: Tensor | None) -> Layout:
    """Compute the layout of a batch on the CPU.

    Parameters
    ----------
    cu_seqlens, cu_seqlens_k, n_known
        As in :class:`scfm.ops.AttentionPlan`: already checked, of any integer dtype, on any device.
    """
    bounds = cu_seqlens.to("cpu", torch.int64)
    lengths_B = bounds.diff()
    n_queries, n_cells = int(bounds[-1]), len(lengths_B)
    cell_T = torch.repeat_interleave(torch.arange(n_cells), lengths_B, output_size=n_queries)
    position_T = torch.arange(n_queries) - bounds[cell_T]
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.to("cpu", torch.int64)
    keys_B, no_rows = bounds_k.diff(), bounds.new_empty(0)
    is_target_T, context_S, target_U = torch.empty(0, dtype=torch.bool), no_rows, no_rows
    if n_known is not None:
        keys_B = n_known.to("cpu", torch.int64)
        is_target_T = position_T >= keys_B[cell_T]
        context_S, target_U = (~is_target_T).nonzero()[:, 0], is_target_T.nonzero()[:, 0]
        bounds_k = torch.nn.functional.pad(keys_B.cumsum(0), (1, 0))
    keyless_N = (keys_B == 0)[cell_T].nonzero()[:, 0]
    cu = torch.cat([bounds, bounds_k]).to(torch.int32).view(torch.int64)
    mask_bytes = torch.nn.functional.pad(is_target_T, (0, -len(is_target_T) % 8)).view(torch.int64)
    numbers = {
        "n_cells": n_cells,
        "n_queries": n_queries,
        "n_context": len(context_S),
        "n_target": len(target_U),
        "n_keyless": len(keyless_N),
        "longest_q": int(lengths_B.max()) if n_cells else 0,
        "longest_k": int(keys_B.max()) if n_cells else 0,
        "has_mask": int(n_known is not None),
        "is_cross": int(cu_seqlens_k is not None),
    }
    edges = [*range(0, n_cells, MAX_CELLS), n_cells]
    of_edges = torch.stack([torch.tensor(edges), bounds[edges], bounds_k[edges]], 1).flatten().tolist()
    return Layout(
        packed=torch.cat([cu, cell_T, position_T, mask_bytes, context_S, target_U, keyless_N]),
        extents=torch.tensor([*(numbers[name] for name in _EXTENTS), *of_edges]),
    )
