"""`scfm.tl.perturb`: what happens to a cell's embedding when a gene is taken away."""

# Axes: B cells, V variants, T packed tokens, D model width.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm import pp
from scfm.data import CellBatch
from scfm.errors import VocabularyMismatchError
from scfm.models.model import TOKENS_PER_BATCH, Model


def perturb(
    adata: anndata.AnnData,
    model: Model,
    *,
    genes: Sequence[str] | None = None,
    kind: str = "delete",
    layer: str | None = None,
    gene_key: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Delete genes in silico, one at a time, and measure how far each cell's embedding moves.

    The gene's token is taken out of the cell, so that under a rank encoding all later genes move up by one rank, as in
    Geneformer (Theodoris et al. 2023). Variants are made a batch at a time: memory does not grow with their number.

    Parameters
    ----------
    adata
        Raw counts of the cells to perturb, n_obs cells by n_vars genes.
    model
        From `scfm.fit` or `scfm.load`.
    genes
        Genes to delete, each in every cell that expresses it; None for all genes of each cell.
    kind
        "delete".
    layer, gene_key
        As in `scfm.tl.embed`.
    progress
        Whether to show a progress bar.

    Returns
    -------
    A row a gene, the largest mean shift first: `n_cells` that express it, `shift_mean`, `shift_std` and `shift_sem` of
    1 - cosine similarity between a cell's embedding before and after, from 0 (nothing) to 2.

    Raises
    ------
    VocabularyMismatchError
        If a gene is not in the vocabulary, or no cell expresses any of them.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:4]
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.perturb(adata, model, genes=["CD74", "CST3"], progress=False).index.name
    'gene'
    """
    if kind != "delete":
        raise ValueError(f"`kind` is {kind!r}; choose 'delete'.")
    cells = pp.encode(adata, model.encoding, layer=layer, gene_key=gene_key)
    deletions = _deletions(cells, _tokens_of(genes, model))
    if not len(deletions):
        raise VocabularyMismatchError(
            f"None of the {len(genes or ())} genes is expressed in these {adata.n_obs} cells. Choose other genes or cells."
        )
    shift_V = np.empty(len(deletions))
    original_BD = model.embed(cells)
    with tqdm(total=len(deletions), desc="deleting", unit="variant", disable=not progress) as bar:
        for rows in _runs(deletions, cells):
            part = deletions.part(rows)
            perturbed_VD = model.embed(without(cells, part.cell_V, part.token_V))
            shift_V[rows] = cosine_distance(original_BD[part.cell_V], perturbed_VD)
            bar.update(rows.stop - rows.start)
    names = np.asarray(model.encoding.vocabulary.tokens, dtype=object)
    return _summary(names[cells.gene_ids_T[torch.from_numpy(deletions.token_V)].numpy()], shift_V)


@dataclass(frozen=True)
class _Deletions:
    """Variants: cell `cell_V` without the token at place `token_V` of the packed tokens; both (V,), int64."""

    cell_V: NDArray[np.int64]
    token_V: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cell_V)

    def part(self, rows: slice) -> _Deletions:
        return _Deletions(self.cell_V[rows], self.token_V[rows])


def _tokens_of(genes: Sequence[str] | None, model: Model) -> NDArray[np.int32]:
    vocabulary = model.encoding.vocabulary
    return vocabulary.gene_ids if genes is None else vocabulary.require(list(genes))


def _deletions(cells: CellBatch, tokens: NDArray[np.int32]) -> _Deletions:
    token_V = np.flatnonzero(np.isin(cells.gene_ids_T.numpy(), tokens))
    cell_V = np.searchsorted(cells.cu_seqlens.numpy(), token_V, side="right") - 1
    more_than_one = cells.lengths_B.numpy()[cell_V] > 1  # a cell's only token cannot be taken away
    return _Deletions(cell_V[more_than_one], token_V[more_than_one])


def _runs(deletions: _Deletions, cells: CellBatch) -> Iterator[slice]:
    """Cut the variants into slices of about `TOKENS_PER_BATCH` tokens."""
    ends = np.cumsum(cells.lengths_B.numpy()[deletions.cell_V])
    start = 0
    while start < len(ends):
        used = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + TOKENS_PER_BATCH, side="right")))
        yield slice(start, stop)
        start = stop


def without(cells: CellBatch, cell_V: NDArray[np.int64], token_V: NDArray[np.int64]) -> CellBatch:
    """Copy cell `cell_V[v]` without the token at `token_V[v]`, for each v; V packed cells."""
    variants = cells.select(torch.from_numpy(cell_V))
    place_V = token_V - cells.cu_seqlens.numpy()[cell_V]
    keep_T = torch.ones(variants.n_tokens, dtype=torch.bool)
    keep_T[variants.cu_seqlens[:-1].long() + torch.from_numpy(place_V)] = False
    shortened = variants.cu_seqlens - torch.arange(len(variants) + 1, dtype=torch.int32)
    values_T = None if variants.values_T is None else variants.values_T[keep_T]
    return variants.replace(gene_ids_T=variants.gene_ids_T[keep_T], values_T=values_T, cu_seqlens=shortened)


def cosine_distance(before_VD: NDArray[np.floating], after_VD: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 - cosine similarity, shape (V,): half the squared distance of unit vectors in float64, exact for tiny shifts."""

    def unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        doubled = vectors.astype(np.float64)
        return doubled / np.linalg.norm(doubled, axis=1, keepdims=True)

    return 0.5 * ((unit(before_VD) - unit(after_VD)) ** 2).sum(1)


def _summary(gene_V: NDArray[np.object_], shift_V: NDArray[np.float64]) -> pd.DataFrame:
    grouped = pd.DataFrame({"gene": gene_V, "shift": shift_V}).groupby("gene")["shift"]
    table = grouped.agg(n_cells="size", shift_mean="mean", shift_std="std", shift_sem="sem")
    return table.sort_values("shift_mean", ascending=False, kind="stable")
