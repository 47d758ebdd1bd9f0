"""`CellBatch`: cells packed end to end, without padding."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.ops.layout import Layout
from scfm.ops.plan import AttentionPlan, make_plan


@dataclass(frozen=True, kw_only=True)
class CellBatch:
    """Cells of different lengths, packed end to end. All parts of the package exchange cells in this form.

    Attributes
    ----------
    gene_ids_T
        Token ids, shape (T,), int32.
    cu_seqlens
        Cell boundaries, shape (B + 1,), first 0, last T, int32. They are int64 in the result of `scfm.pp.encode`, and if
        there are too many tokens for int32.
    values_T
        Value of each token (bin, bucket or log-expression), shape (T,), float32; None for rank encodings.
    n_known
        Number of leading context tokens of each cell for the generative mask, shape (B,), int32; None if all tokens are
        context.
    cell_index_B
        Row of each cell in its source, shape (B,), int64.
    labels_B
        Class of each cell, shape (B,), int64, -1 for an unlabeled cell.
    batch_ids_B
        Experimental batch of each cell, shape (B,), int64.
    depth_B
        Total counts of each cell over all genes of its matrix, shape (B,), float32.
    plan
        Plan of the attention within the cells (`scfm.ops.make_plan`), if it was made in advance. None: the network makes it.

    Examples
    --------
    >>> import torch, scfm
    >>> cells = scfm.CellBatch(gene_ids_T=torch.tensor([4, 7, 5], dtype=torch.int32), cu_seqlens=torch.tensor([0, 2, 3]))
    >>> cells.n_cells, cells.lengths_B.tolist()
    (2, [2, 1])
    >>> cells.select([1]).gene_ids_T.tolist()
    [5]
    """

    gene_ids_T: Tensor
    cu_seqlens: Tensor
    values_T: Tensor | None = None
    n_known: Tensor | None = None
    cell_index_B: Tensor | None = None
    labels_B: Tensor | None = None
    batch_ids_B: Tensor | None = None
    depth_B: Tensor | None = None
    plan: AttentionPlan | None = None

    @property
    def n_cells(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def n_tokens(self) -> int:
        return self.gene_ids_T.shape[0]

    @property
    def device(self) -> torch.device:
        return self.gene_ids_T.device

    @property
    def lengths_B(self) -> Tensor:
        return self.cu_seqlens.diff()

    def __len__(self) -> int:
        return self.n_cells

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CellBatch:
        """Return the batch with every tensor on `device`. With `non_blocking`, the host does not wait for pinned tensors.

        Before a batch is sent to a GPU, its plan is made, because reading boundaries back from the GPU would be slow.
        """
        sent = torch.device(device).type == "cuda" and self.device.type == "cpu"
        batch = self.planned() if sent else self
        return batch._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CellBatch:
        """Return the batch with every tensor in pinned memory, from which copies to a GPU are asynchronous."""
        return self._map(lambda tensor: tensor.pin_memory())

    def planned(self) -> CellBatch:
        """Return the batch with its attention plan, including the layout for a GPU. The batch must be on the host."""
        plan = self.plan or make_plan(self.cu_seqlens, n_known=self.n_known)
        return dataclasses.replace(self, plan=plan.laid_out())

    def replace(self, **changes: Any) -> CellBatch:
        if not {"cu_seqlens", "n_known"}.isdisjoint(changes):
            changes = {"plan": None, **changes}  # it was that of other boundaries
        return dataclasses.replace(self, **changes)

    def select(self, cells: Sequence[int] | NDArray[np.integer | np.bool_] | Tensor) -> CellBatch:
        """Take the given cells as a new batch with int32 boundaries.

        Parameters
        ----------
        cells
            Indices of cells, in the order in which they are taken, negative ones counted from the end; or a boolean mask,
            shape (B,).

        Raises
        ------
        IndexError
            If there is no such cell, or a mask has another shape.
        TypeError
            If indices are not whole numbers.
        ValueError
            If the cells hold more tokens than int32 can count.
        """
        cells_B = self._indices(cells)
        starts_B, stops_B = self.cu_seqlens[cells_B].long(), self.cu_seqlens[cells_B + 1].long()
        lengths_B = stops_B - starts_B
        cu_seqlens = torch.zeros(len(cells_B) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths_B, 0, out=cu_seqlens[1:])
        if int(cu_seqlens[-1]) > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"A batch of {len(cells_B)} cells holds {int(cu_seqlens[-1])} tokens, but int32 boundaries allow at most "
                "2,147,483,647. Select fewer cells at a time."
            )
        take = self._taker(starts_B, stops_B, cu_seqlens)
        return CellBatch(
            gene_ids_T=take(self.gene_ids_T),
            cu_seqlens=cu_seqlens.to(torch.int32),
            values_T=None if self.values_T is None else take(self.values_T),
            **{
                name: None if (tensor := getattr(self, name)) is None else tensor[cells_B]
                for name in ("n_known", "cell_index_B", "labels_B", "batch_ids_B", "depth_B")
            },
        )

    def _indices(self, cells: Sequence[int] | NDArray[np.integer | np.bool_] | Tensor) -> Tensor:
        """Indices of cells from 0, int64, of indices or a mask."""
        cells_B = torch.as_tensor(cells, device=self.device)
        if cells_B.dtype == torch.bool:
            if cells_B.shape != (self.n_cells,):
                raise IndexError(f"The mask has the shape {tuple(cells_B.shape)}; the batch has {self.n_cells} cells.")
            return cells_B.nonzero()[:, 0]
        if cells_B.numel() and (cells_B.is_floating_point() or cells_B.is_complex()):
            raise TypeError(f"`cells` holds numbers of type {cells_B.dtype}; indices are whole numbers.")
        cells_B = cells_B.long()
        wrong_B = (cells_B < -self.n_cells) | (cells_B >= self.n_cells)
        if bool(wrong_B.any()):
            raise IndexError(f"There is no cell {int(cells_B[wrong_B][0])}; the batch has {self.n_cells} cells.")
        return torch.where(cells_B < 0, cells_B + self.n_cells, cells_B)

    def _taker(self, starts_B: Tensor, stops_B: Tensor, cu_seqlens: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function that copies the tokens of some cells; on the CPU it copies whole cells, five times as fast."""
        if self.device.type == "cpu":
            spans = list(map(slice, starts_B.tolist(), stops_B.tolist()))

            def take_runs(tensor_T: Tensor) -> Tensor:
                array_T = tensor_T.detach().numpy()
                return torch.from_numpy(np.concatenate([array_T[span] for span in spans])) if spans else tensor_T[:0]

            return take_runs
        token_T = torch.arange(int(cu_seqlens[-1]), device=self.device)
        token_T += torch.repeat_interleave(starts_B - cu_seqlens[:-1], stops_B - starts_B)
        return lambda tensor_T: tensor_T[token_T]

    def cell_of_token_T(self) -> Tensor:
        """Cell of each token, shape (T,), int64."""
        if (layout := self._layout()) is not None:
            return layout.sections().cell_T
        return torch.repeat_interleave(
            torch.arange(self.n_cells, device=self.device), self.lengths_B.long(), output_size=self.n_tokens
        )

    def position_T(self) -> Tensor:
        """Position of each token in its cell, from 0, shape (T,), int64."""
        if (layout := self._layout()) is not None:
            return layout.sections().position_T
        starts_T = torch.repeat_interleave(
            self.cu_seqlens[:-1].long(), self.lengths_B.long(), output_size=self.n_tokens
        )
        return torch.arange(self.n_tokens, device=self.device) - starts_T

    def _layout(self) -> Layout | None:
        """The layout of the plan, if it is where the tokens are."""
        layout = None if self.plan is None else self.plan.layout
        return layout if layout is not None and layout.device == self.device else None

    def select_tokens(self, keep_T: Tensor) -> CellBatch:
        """Return the cells with only the tokens of the mask `keep_T`, shape (T,), bool."""
        kept = torch.cat([keep_T.new_zeros(1, dtype=torch.int64), keep_T.long().cumsum(0)])
        return self.replace(
            gene_ids_T=self.gene_ids_T[keep_T],
            values_T=None if self.values_T is None else self.values_T[keep_T],
            cu_seqlens=kept[self.cu_seqlens.long()].to(self.cu_seqlens.dtype),
            n_known=None,
        )

    def plan_of_queries(self, token_N: Tensor) -> AttentionPlan:
        """Return the plan by which some tokens, in ascending order, attend to all tokens of their cells."""
        bounds = torch.searchsorted(token_N, self.cu_seqlens.to(token_N.dtype))
        return make_plan(bounds, cu_seqlens_k=self.cu_seqlens)

    @staticmethod
    def concat(batches: Sequence[CellBatch]) -> CellBatch:
        """Concatenate batches; boundaries become int64 if there are too many tokens for int32."""
        total = sum(batch.n_tokens for batch in batches)
        dtype = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
        cu_seqlens = torch.zeros(sum(batch.n_cells for batch in batches) + 1, dtype=torch.int64)
        torch.cumsum(torch.cat([batch.lengths_B.long() for batch in batches]), 0, out=cu_seqlens[1:])
        joined: dict[str, Tensor | None] = {"cu_seqlens": cu_seqlens.to(dtype)}
        for field in dataclasses.fields(CellBatch):
            if field.name in ("cu_seqlens", "plan"):
                continue
            parts = [getattr(batch, field.name) for batch in batches]
            joined[field.name] = None if any(part is None for part in parts) else _join(parts)
        return CellBatch(**joined)  # type: ignore[arg-type]

    def _map(self, move: object) -> CellBatch:
        changes = {
            field.name: move(tensor)  # type: ignore[operator]
            for field in dataclasses.fields(self)
            if (tensor := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **changes)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors; on the CPU with NumPy, because `torch.cat` starts threads that then wait in a busy loop."""
    if parts and all(part.device.type == "cpu" for part in parts):
        return torch.from_numpy(np.concatenate([part.detach().numpy() for part in parts]))
    return torch.cat(list(parts))
