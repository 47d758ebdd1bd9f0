"""Change the tokens of a cell according to a perturbation."""

# Axes: N tokens of one cell, G gene tokens of one cell, P perturbed genes.

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scfm.encoding import Encoding

Kind = Literal["delete", "overexpress", "inhibit", "activate"]
Positions = Literal["shift", "held"]


@dataclass(frozen=True)
class TokenCell:
    """One cell: token ids (N,), int32; values (N,), float32 or None; positions (N,), int64, or None for 0..N - 1."""

    gene_ids_N: NDArray[np.int32]
    values_N: NDArray[np.float32] | None = None
    position_N: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.gene_ids_N)

    def digest(self) -> bytes:
        """Return a hash of 16 bytes, which is equal for equal cells."""
        digest = hashlib.blake2b(self.gene_ids_N.tobytes(), digest_size=16)
        for array in (self.values_N, self.position_N):
            digest.update(b"-" if array is None else array.tobytes())
        return digest.digest()


@dataclass(frozen=True, kw_only=True)
class Editor:
    """Applies perturbations to cells of one encoding.

    Attributes
    ----------
    kind
        "delete" removes the token of the gene, or sets its value to 0 if genes without counts have tokens. "overexpress"
        makes the gene the first (rank encoding) or gives it the largest value of the cell (other encodings), and inserts it
        if it was not expressed. "inhibit" and "activate" lower or raise its rank, or the quantile of its value in the cell,
        by `quantile`.
    positions
        For deletions with a rank encoding: later genes move up by one ("shift") or keep their positions ("held").
    quantile
        Change of "inhibit" and "activate", as a fraction of the cell's genes.
    ordered, keeps_zeros, n_front, n_back, context_length
        Properties of the encoding: whether the order of tokens is their rank, whether genes without counts have tokens,
        numbers of special tokens before and after the genes, maximum number of tokens.

    Notes
    -----
    Geneformer (Theodoris et al. 2023) moves a gene to the middle of another quartile. Here the rank changes by a fraction of
    the cell's genes, so that the order of several changed genes is kept.
    """

    kind: Kind
    positions: Positions = "shift"
    quantile: float = 0.25
    ordered: bool = True
    keeps_zeros: bool = False
    n_front: int = 0
    n_back: int = 0
    context_length: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` is {self.kind!r}; choose one of {', '.join(get_args(Kind))}.")
        if self.positions not in get_args(Positions):
            raise ValueError(f"`positions` is {self.positions!r}; choose 'shift' or 'held'.")
        if self.positions == "held" and self.kind != "delete":
            raise ValueError(f"`positions` is 'held', which is for deletions. With kind {self.kind!r} omit it.")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"`quantile` is {self.quantile}; it must be above 0 and at most 1.")

    @classmethod
    def of(cls, encoding: Encoding, kind: str, *, positions: str = "shift", quantile: float = 0.25) -> Editor:
        """Return an editor for cells of an encoding."""
        config = encoding.config
        n_front = int(bool(config.add_cls))
        return cls(
            kind=kind,  # type: ignore[arg-type]
            positions=positions,  # type: ignore[arg-type]
            quantile=quantile,
            ordered=config.is_ordered,
            keeps_zeros=bool(config.include_zeros),
            n_front=n_front,
            n_back=config.n_special_tokens - n_front,
            context_length=config.context_length,
        )

    def of_values(self) -> Editor:
        """Return the editor that makes the same perturbation in values of all genes, such as log-expression."""
        return Editor(kind=self.kind, quantile=self.quantile, ordered=False, keeps_zeros=True)

    @property
    def needs_expression(self) -> bool:
        """Whether a gene must be expressed to be perturbed."""
        return self.kind != "overexpress"

    def expressed(self, cell: TokenCell) -> NDArray[np.int32]:
        """Return the ids of the genes that the cell expresses, in the order of its tokens, shape (G,)."""
        genes = self._genes(cell)
        ids_G = cell.gene_ids_N[genes]
        if self.keeps_zeros and cell.values_N is not None:
            return ids_G[cell.values_N[genes] > 0]
        return ids_G

    def edit(self, cell: TokenCell, tokens: Sequence[int]) -> TokenCell:
        """Perturb the given genes together. They must be expressed if `needs_expression` is True."""
        tokens_P = np.asarray(tokens, dtype=np.int32)
        if self.kind == "delete":
            return self._zero(cell, tokens_P) if self.keeps_zeros else self._delete(cell, tokens_P)
        if self.kind == "overexpress":
            return self._to_front(cell, tokens_P) if self.ordered else self._to_largest(cell, tokens_P)
        return self._move_rank(cell, tokens_P) if self.ordered else self._move_value(cell, tokens_P)

    def _genes(self, cell: TokenCell) -> slice:
        return slice(self.n_front, len(cell) - self.n_back)

    def _delete(self, cell: TokenCell, tokens_P: NDArray[np.int32]) -> TokenCell:
        return self.keep(cell, ~np.isin(cell.gene_ids_N, tokens_P))

    def keep(self, cell: TokenCell, kept_N: NDArray[np.bool_]) -> TokenCell:
        """Delete all other tokens of a cell."""
        held = self.ordered and self.positions == "held"
        return TokenCell(
            cell.gene_ids_N[kept_N],
            None if cell.values_N is None else cell.values_N[kept_N],
            np.flatnonzero(kept_N) if held else None,
        )

    def _zero(self, cell: TokenCell, tokens_P: NDArray[np.int32]) -> TokenCell:
        return TokenCell(cell.gene_ids_N, np.where(np.isin(cell.gene_ids_N, tokens_P), 0, _values(cell)))

    def _to_front(self, cell: TokenCell, tokens_P: NDArray[np.int32]) -> TokenCell:
        ids_N, genes = cell.gene_ids_N, self._genes(cell)
        others_G = ids_N[genes][~np.isin(ids_N[genes], tokens_P)]
        genes_G = np.concatenate([tokens_P, others_G])
        if self.context_length is not None:  # if the context is full, the last gene is dropped
            genes_G = genes_G[: self.context_length - self.n_front - self.n_back]
        return TokenCell(np.concatenate([ids_N[: self.n_front], genes_G, ids_N[genes.stop :]]))

    def _to_largest(self, cell: TokenCell, tokens_P: NDArray[np.int32]) -> TokenCell:
        """Give the genes the largest value, and insert genes without a token in the order of ids.

        If the context is full, the genes with the lowest values are dropped.
        """
        genes = self._genes(cell)
        ids_G, values_G = cell.gene_ids_N[genes], _values(cell)[genes].copy()
        largest = values_G.max()
        values_G[np.isin(ids_G, tokens_P)] = largest
        new_P = np.setdiff1d(tokens_P, ids_G)
        ids_G = np.concatenate([ids_G, new_P])
        values_G = np.concatenate([values_G, np.full(len(new_P), largest, dtype=np.float32)])
        if self.context_length is not None and len(ids_G) > (limit := self.context_length - self.n_front - self.n_back):
            strength_G = np.where(np.isin(ids_G, tokens_P), np.inf, values_G)
            kept = np.sort(np.argsort(-strength_G, kind="stable")[:limit])
            ids_G, values_G = ids_G[kept], values_G[kept]
        order = np.argsort(ids_G, kind="stable")
        return self._framed(cell, ids_G[order], values_G[order])

    def _move_rank(self, cell: TokenCell, tokens_P: NDArray[np.int32]) -> TokenCell:
        ids_G = cell.gene_ids_N[self._genes(cell)]
        step = max(1, round(self.quantile * len(ids_G)))
        down = 1 if self.kind == "inhibit" else -1
        position_G = np.arange(len(ids_G), dtype=np.float64)
        # Half a position beyond the gene at the new position, so that the two change places.
        position_G[np.isin(ids_G, tokens_P)] += down * (step + 0.5)
        return self._framed(cell, ids_G[np.argsort(position_G, kind="stable")], None)

    def _move_value(self, cell: TokenCell, tokens_P: NDArray[np.int32]) -> TokenCell:
        genes = self._genes(cell)
        ids_G, values_G = cell.gene_ids_N[genes], _values(cell)[genes].copy()
        sorted_values = np.sort(values_G[values_G > 0])
        for index in np.flatnonzero(np.isin(ids_G, tokens_P)):
            below = np.searchsorted(sorted_values, values_G[index], side="left")
            upto = np.searchsorted(sorted_values, values_G[index], side="right")
            quantile = (below + upto) / (2 * len(sorted_values))
            step = -self.quantile if self.kind == "inhibit" else self.quantile
            # An existing value of the cell, so that bins and buckets are whole numbers.
            moved = np.quantile(sorted_values, np.clip(quantile + step, 0, 1), method="nearest")
            values_G[index] = min(moved, values_G[index]) if step < 0 else max(moved, values_G[index])
        return self._framed(cell, ids_G, values_G)

    def _framed(self, cell: TokenCell, ids_G: NDArray, values_G: NDArray | None) -> TokenCell:
        stop = self._genes(cell).stop
        ids_N = np.concatenate([cell.gene_ids_N[: self.n_front], ids_G, cell.gene_ids_N[stop:]])
        if values_G is None:
            return TokenCell(ids_N)
        values_N = _values(cell)
        return TokenCell(ids_N, np.concatenate([values_N[: self.n_front], values_G, values_N[stop:]]))


def _values(cell: TokenCell) -> NDArray[np.float32]:
    assert cell.values_N is not None  # value encodings have them
    return cell.values_N
