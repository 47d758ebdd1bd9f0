"""Which variants of which cells: the genes that were named as tokens, and variants packed into batches."""

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
from scfm.vocab import Vocabulary

Genes = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class Perturbations:
    """What is done to each cell.

    Attributes
    ----------
    tokens
        Tokens of the genes that are perturbed together, one tuple per perturbation; None for every gene of each cell,
        one at a time.
    names
        One per perturbation; those of genes perturbed together are joined by "+".
    absent
        Perturbations that were asked for and name a gene that the vocabulary lacks, with the reason.
    n_asked
        How many of `tokens`, the first ones, were asked for; the others are the null. None if all were.
    null_name
        What the null is, in words.
    null_cells
        Cells in which the null is perturbed; None for all.
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
        """Read `genes`: names, or groups of names to perturb together; with `combine` all combinations of that size."""
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
        """Append the null's perturbations; those that are asked for too stay where they are."""
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
        """Names of the perturbations that were asked for, without those of the null alone."""
        return self.names[: self.n_asked]

    def of_cell(self, cell: int, expressed: NDArray[np.int32], editor: Editor) -> list[tuple[int, tuple[int, ...]]]:
        """(Number, tokens) of each perturbation that can be done to a cell, without leaving it no gene.

        `expressed` are the genes that it expresses.
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

    def has_combinations(self) -> bool:
        return self.tokens is not None and any(len(tokens) > 1 for tokens in self.tokens)


def name_groups(genes: Genes) -> list[tuple[str, ...]]:
    """Each entry as a tuple of distinct names, each tuple once."""
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
    """Token of each name that is a gene of the vocabulary, and for each other name what is wrong with it."""
    tokens, faults = {}, {}
    for name, token in zip(names, vocabulary.find(names)[0].tolist()):
        if token >= 0:
            tokens[name] = token
        elif name not in faults:
            faults[name] = f"{name!r} is not a gene of the model's vocabulary.{similar_gene(name, vocabulary.genes)}"
    return tokens, faults


def similar_gene(name: str, genes: Sequence[str]) -> str:
    """The question whether the most similar gene was meant, after a space; an empty text if none is similar."""
    plain = name.strip().casefold()
    same = next((gene for gene in genes if gene.casefold() == plain), None)
    return f" Did you mean {same!r}?" if same else did_you_mean(name, list(genes))


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
