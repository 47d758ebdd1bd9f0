"""Perturbations of cells: named genes as tokens, and perturbed cells (variants) packed into batches."""

# Axes: B cells, T packed tokens, N tokens of one cell.

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm._config import did_you_mean
from scfm.data import CellBatch
from scfm.perturbation.edits import Editor, TokenCell
from scfm.vocab import Vocabulary, guess_id_type

Genes = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class Perturbations:
    """The perturbations to compute, those of the null included.

    Attributes
    ----------
    tokens
        Tokens of the genes that are perturbed together, one tuple per perturbation. None to perturb each gene of each cell
        alone.
    names
        One name per perturbation. Names of genes that are perturbed together are joined by "+".
    absent
        Requested perturbations with a gene that is not in the vocabulary, and the reason for each.
    n_asked
        Number of requested perturbations, which come first in `tokens`; the rest belong to the null only. None if there is no
        null.
    null_name
        Description of the null in words.
    null_cells
        Cells in which the perturbations of the null are computed; None for all cells.
    """

    tokens: tuple[tuple[int, ...], ...] | None
    names: tuple[str, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    n_asked: int | None = None
    null_name: str = ""
    null_rows: tuple[int, ...] | None = None
    null_cells: frozenset[int] | None = None

    @classmethod
    def of(cls, genes: Genes | None, vocabulary: Vocabulary, *, combine: int = 1) -> Perturbations:
        """Convert `genes` (names or groups of names); with `combine`, use all combinations of that many names."""
        if combine < 1:
            raise ValueError(f"`combine` is {combine}; it must be at least 1.")
        if genes is None:
            if combine > 1:
                raise ValueError(f"`combine` is {combine}, which needs the `genes` to combine; name them.")
            return cls(None, vocabulary.tokens)
        groups = name_groups(genes)
        if combine > 1:
            singles = [name for group in groups for name in group]
            groups = list(itertools.combinations(dict.fromkeys(singles), combine))
        token_of, faults = lookup([name for group in groups for name in group], vocabulary)
        tokens, absent = {}, {}
        for group in groups:
            name = "+".join(group)
            if missing := [faults[gene] for gene in group if gene in faults]:
                absent[name] = "; ".join(missing)
            else:
                tokens[name] = tuple(dict.fromkeys(token_of[gene] for gene in group))
        return cls(tuple(tokens.values()), tuple(tokens), absent)

    def with_null(self, null: Perturbations, name: str, cells: frozenset[int] | None = None) -> Perturbations:
        """Append the perturbations of the null. Those that are already among the requested ones are not repeated."""
        assert self.tokens is not None
        assert null.tokens is not None
        joined = dict(zip(self.names, self.tokens)) | dict(zip(null.names, null.tokens))
        names = tuple(joined)
        return replace(
            self,
            tokens=tuple(joined.values()),
            names=names,
            n_asked=len(self.names),
            null_name=name,
            null_rows=tuple(names.index(other) for other in null.names),
            null_cells=cells,
        )

    @property
    def asked_names(self) -> tuple[str, ...]:
        """Names of the requested perturbations, without those that belong to the null only."""
        return self.names[: self.n_asked]

    def of_cell(self, cell: int, expressed: NDArray[np.int32], editor: Editor) -> list[tuple[int, tuple[int, ...]]]:
        """Return (number, tokens) of each perturbation that is possible in a cell; a deletion must leave at least one gene.

        `expressed` are the tokens of the genes that the cell expresses.
        """
        if self.tokens is None:
            return [(int(token), (int(token),)) for token in expressed] if len(expressed) > 1 else []
        with_null = self.null_cells is None or cell in self.null_cells
        present = set(expressed.tolist())
        found = []
        for number, tokens in enumerate(self.tokens if with_null else self.tokens[: self.n_asked]):
            if editor.needs_expression and not present.issuperset(tokens):
                continue
            if editor.kind == "delete" and len(expressed) <= len(tokens):
                continue
            found.append((number, tokens))
        return found

    def tokens_of(self, number: int) -> tuple[int, ...]:
        """Tokens of a perturbation; a number -1 - g stands for token g alone."""
        if number < 0:
            return (-1 - number,)
        return (number,) if self.tokens is None else self.tokens[number]

    def has_combinations(self) -> bool:
        return self.tokens is not None and any(len(tokens) > 1 for tokens in self.tokens)


def name_groups(genes: Genes) -> list[tuple[str, ...]]:
    """Convert each entry to a tuple of distinct names, and drop repeated tuples."""
    if isinstance(genes, str):
        raise ValueError(f"`genes` is the text {genes!r}; pass a list of names, such as [{genes!r}].")
    groups = []
    for entry in genes:
        names = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, Iterable) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`genes` has the entry {entry!r}; each must be a name, or a list of names.")
        groups.append(tuple(dict.fromkeys(names)))
    if not groups:
        raise ValueError("`genes` is empty; name at least one gene, or pass None for all genes.")
    return list(dict.fromkeys(groups))


def lookup(names: Sequence[str], vocabulary: Vocabulary) -> tuple[dict[str, int], dict[str, str]]:
    """Return the token of each name that is a gene of the vocabulary, and an explanation for each other name."""
    tokens, faults = {}, {}
    for name, token in zip(names, vocabulary.find(names)[0].tolist()):
        if token >= 0:
            tokens[name] = token
        elif name not in faults:
            genes = vocabulary.genes if guess_id_type([name]) == vocabulary.id_type else tuple(vocabulary.aliases)
            faults[name] = (
                f"{name!r} is not a gene of the model's vocabulary.{similar_gene(name, genes or vocabulary.genes)}"
            )
    return tokens, faults


def similar_gene(name: str, genes: Sequence[str]) -> str:
    """Return a space and a question that suggests the most similar gene, or an empty text if no gene is similar."""
    plain = name.strip().casefold()
    same = next((gene for gene in genes if gene.casefold() == plain), None)
    return f" Did you mean {same!r}?" if same else did_you_mean(name, list(genes))


@dataclass(frozen=True, kw_only=True)
class PositionedBatch(CellBatch):
    """A batch with explicit token positions, shape (T,), int64. In a plain batch, positions count from 0 in each cell."""

    given_position_T: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def position_T(self) -> Tensor:
        return self.given_position_T


def at_positions(cells: CellBatch, position_T: Tensor) -> PositionedBatch:
    """Return a batch with the same tokens at the given positions."""
    fields = {field.name: getattr(cells, field.name) for field in dataclasses.fields(CellBatch)}
    return PositionedBatch(**fields, given_position_T=position_T)


def cell_of(cells: CellBatch, cell: int) -> TokenCell:
    """One cell of a batch, as arrays."""
    span = slice(int(cells.cu_seqlens[cell]), int(cells.cu_seqlens[cell + 1]))
    values = None if cells.values_T is None else cells.values_T[span].numpy()
    return TokenCell(cells.gene_ids_T[span].numpy(), values)


def pack(variants: Sequence[TokenCell]) -> CellBatch:
    """Pack variants into one batch."""
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
