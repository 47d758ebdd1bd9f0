"""Which variants of which cells: what the caller names, spelled out in tokens, and packed into batches."""

# Axes: B cells, T packed tokens, N tokens of one cell.

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.data import CellBatch
from scfm.errors import VocabularyMismatchError
from scfm.perturbation.edits import Editor, TokenCell
from scfm.vocab import Vocabulary

Genes = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class Perturbations:
    """What is done to each cell.

    Attributes
    ----------
    tokens
        Tokens of the genes that are perturbed together, one tuple a perturbation; None for every gene of each cell, singly.
    names
        One a perturbation; those of genes perturbed together are joined by "+".
    """

    tokens: tuple[tuple[int, ...], ...] | None
    names: tuple[str, ...]

    @classmethod
    def of(cls, genes: Genes | None, vocabulary: Vocabulary, *, combine: int = 1) -> Perturbations:
        """Read `genes`: names, or groups of names to perturb together; with `combine` all combinations of that size."""
        if combine < 1:
            raise ValueError(f"`combine` is {combine}; it must be at least 1.")
        if genes is None:
            if combine > 1:
                raise ValueError(f"`combine` is {combine}, which needs the `genes` to combine; name them.")
            return cls(None, vocabulary.tokens)
        if isinstance(genes, str):
            raise ValueError(f"`genes` is the text {genes!r}; pass a list of names, such as [{genes!r}].")
        groups = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in genes]
        if combine > 1:
            singles = [name for group in groups for name in group]
            groups = list(itertools.combinations(dict.fromkeys(singles), combine))
        groups = list(dict.fromkeys(groups))
        if not groups or not all(groups):
            raise ValueError(f"`genes` has {len(groups)} entries, or an empty one; name at least one gene in each.")
        tokens = tuple(tuple(int(token) for token in vocabulary.require(list(group))) for group in groups)
        return cls(tokens, tuple("+".join(group) for group in groups))

    def of_cell(self, expressed: NDArray[np.int32], n_genes: int, editor: Editor) -> list[tuple[int, tuple[int, ...]]]:
        """(Number, tokens) of each perturbation that can be done to a cell, without leaving it no gene."""
        if self.tokens is None:
            return [(int(token), (int(token),)) for token in expressed] if n_genes > 1 else []
        present = set(expressed.tolist())
        found = []
        for number, tokens in enumerate(self.tokens):
            if editor.needs_expression and not present.issuperset(tokens):
                continue
            if editor.kind == "delete" and n_genes <= len(tokens):
                continue
            found.append((number, tokens))
        return found

    def has_combinations(self) -> bool:
        return self.tokens is not None and any(len(tokens) > 1 for tokens in self.tokens)


@dataclass(frozen=True, kw_only=True)
class PositionedBatch(CellBatch):
    """A batch with given positions of its tokens, shape (T,), int64; in a plain batch they count from 0 in each cell."""

    given_position_T: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def position_T(self) -> Tensor:
        return self.given_position_T


def at_positions(cells: CellBatch, position_T: Tensor) -> PositionedBatch:
    """The same tokens at other positions."""
    fields = {field.name: getattr(cells, field.name) for field in dataclasses.fields(CellBatch)}
    return PositionedBatch(**fields, given_position_T=position_T)


def cell_of(cells: CellBatch, cell: int) -> TokenCell:
    """One cell of a batch, as arrays."""
    span = slice(int(cells.cu_seqlens[cell]), int(cells.cu_seqlens[cell + 1]))
    values = None if cells.values_T is None else cells.values_T[span].numpy()
    return TokenCell(cells.gene_ids_T[span].numpy(), values)


def pack(variants: Sequence[TokenCell]) -> CellBatch:
    """Lay variants end to end."""
    lengths = np.cumsum([0, *(len(variant) for variant in variants)])
    arrays = {
        "gene_ids_T": torch.from_numpy(np.concatenate([variant.gene_ids_N for variant in variants])),
        "cu_seqlens": torch.from_numpy(lengths.astype(np.int32)),
        "values_T": None
        if variants[0].values_N is None
        else torch.from_numpy(
            np.concatenate([variant.values_N for variant in variants if variant.values_N is not None])
        ),
    }
    cells = CellBatch(**arrays)  # type: ignore[arg-type]
    if variants[0].position_N is None:
        return cells
    positions = np.concatenate([variant.position_N for variant in variants if variant.position_N is not None])
    return at_positions(cells, torch.from_numpy(positions))


def require_some(n_variants: int, perturbations: Perturbations, n_cells: int) -> None:
    """Raise `VocabularyMismatchError` if there is nothing to do."""
    if n_variants == 0:
        raise VocabularyMismatchError(
            f"None of the {len(perturbations.tokens or ())} perturbations can be done in these {n_cells} cells: a cell "
            "must express all genes that are perturbed together, and keep at least one other. Choose other genes or cells."
        )
