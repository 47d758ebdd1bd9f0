"""Networks of the genes of a group of cells, by attention or by the effects of deletions on other genes."""

# Axes: B cells, E edges, G genes of the network, P pairs of tokens, T packed tokens.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse, special
from tqdm.auto import tqdm

from scfm import ops, pp
from scfm.data import CellBatch, CountSource
from scfm.models.inference import TOKENS_PER_BATCH, runs_of_tokens
from scfm.models.model import Model
from scfm.perturbation.edits import Editor
from scfm.perturbation.shifts import cosine_distance
from scfm.perturbation.statistics import false_discovery_rate
from scfm.perturbation.variants import cell_of, pack
from scfm.pp._encode import open_counts

N_GENES = 50  # number of genes in the network if no genes are named


def gene_network(
    adata: anndata.AnnData,
    model: Model,
    *,
    genes: list[str] | None = None,
    kind: str = "attention",
    hidden_layer: int = -1,
    n_shuffles: int = 5,
    min_cells: int = 5,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Table of edges between genes; `scfm.tl.gene_network` explains it."""
    if kind not in ("attention", "deletion"):
        raise ValueError(f"`kind` is {kind!r}; choose 'attention' or 'deletion'.")
    if n_shuffles < 2:
        raise ValueError(f"`n_shuffles` is {n_shuffles}; a null needs at least 2.")
    depth_key = open_counts(adata, model.encoding, layer=layer, depth_key=depth_key).depth_key  # used for the null too
    cells = pp.encode(adata, model.encoding, layer=layer, gene_key=gene_key, depth_key=depth_key, empty="keep")
    tokens = _tokens(genes, cells, model)
    measure = attention_edges if kind == "attention" else deletion_edges
    rng = np.random.default_rng(seed)
    with tqdm(total=1 + n_shuffles, desc=f"{kind} edges", unit="pass", disable=not progress) as bar:
        found = measure(model, cells, tokens, hidden_layer)
        bar.update()
        null = Edges.none(len(tokens))
        for _ in range(n_shuffles):
            copied = shuffle_counts(adata, rng, layer, depth_key)
            shuffled = pp.encode(copied, model.encoding, gene_key=gene_key, empty="keep")
            null += measure(model, shuffled, tokens, hidden_layer)
            bar.update()
    table = edge_table(found, null, [model.encoding.vocabulary.tokens[token] for token in tokens], min_cells)
    table.insert(4, "null", f"{n_shuffles} shuffles of each gene's counts among the cells")
    return table


def _tokens(genes: list[str] | None, cells: CellBatch, model: Model) -> NDArray[np.int64]:
    vocabulary = model.encoding.vocabulary
    if genes is not None:
        return np.unique(vocabulary.require(genes)).astype(np.int64)
    counts = np.bincount(cells.gene_ids_T.numpy(), minlength=len(vocabulary))
    common = vocabulary.gene_ids[np.argsort(-counts[vocabulary.gene_ids], kind="stable")]
    return np.sort(common[:N_GENES]).astype(np.int64)


def shuffle_counts(
    adata: anndata.AnnData, rng: np.random.Generator, layer: str | None, depth_key: str | None = None
) -> anndata.AnnData:
    """Shuffle the counts of each gene among the cells, so that genes keep their distributions but become independent.

    Each cell keeps its depth if the depth is stored in a column of `obs`.
    """
    source = CountSource.of(adata, layer=layer, depth_key=depth_key)
    counts = sparse.vstack([block for _, block, _ in source.blocks()]).tocsc().copy()
    for column in range(counts.shape[1]):
        span = slice(counts.indptr[column], counts.indptr[column + 1])
        counts.indices[span] = rng.choice(counts.shape[0], span.stop - span.start, replace=False)
    counts.has_sorted_indices = False
    shuffled = anndata.AnnData(counts.tocsr(), var=source.var.copy())
    if source.named_depth is not None:
        shuffled.obs["depth"] = source.named_depth
        shuffled.uns["scfm"] = {"depth_key": "depth"}
    return shuffled


@dataclass
class Edges:
    """Number, sum and sum of squares of each edge's weights over the cells with both genes; source by target, (G, G)."""

    n_GG: NDArray[np.int64]
    sum_GG: NDArray[np.float64]
    square_GG: NDArray[np.float64]

    @classmethod
    def none(cls, n_genes: int) -> Edges:
        return cls(np.zeros((n_genes,) * 2, np.int64), np.zeros((n_genes,) * 2), np.zeros((n_genes,) * 2))

    def add(self, source_P: Any, target_P: Any, values_P: NDArray[np.float64]) -> None:
        """Add one value for each pair of genes. A pair may occur more than once."""
        for into_GG, added in ((self.n_GG, 1), (self.sum_GG, values_P), (self.square_GG, values_P**2)):
            np.add.at(into_GG, (source_P, target_P), added)

    def __add__(self, other: Edges) -> Edges:
        return Edges(self.n_GG + other.n_GG, self.sum_GG + other.sum_GG, self.square_GG + other.square_GG)

    @property
    def mean_GG(self) -> NDArray[np.float64]:
        """Mean over cells; 0 if there are none."""
        return self.sum_GG / np.maximum(self.n_GG, 1)

    @property
    def std_GG(self) -> NDArray[np.float64]:
        """Standard deviation between cells; 0 if there are fewer than two."""
        squares_GG = self.square_GG - self.n_GG * self.mean_GG**2
        return np.sqrt(np.maximum(squares_GG, 0) / np.maximum(self.n_GG - 1, 1))


def attention_edges(model: Model, cells: CellBatch, tokens: NDArray[np.int64], hidden_layer: int) -> Edges:
    """Edges whose weight is the attention of target to source: the mean over heads, times the number of tokens in the cell."""
    network, config = model.network.eval(), model.network.config
    if config.attention.kind != "softmax":
        raise ValueError('This model has linear attention, which has no scores. Use `kind="deletion"`.')
    edges = Edges.none(len(tokens))
    for rows in runs_of_tokens(cells.cu_seqlens.numpy(), TOKENS_PER_BATCH):
        batch = cells.select(torch.arange(rows.start, rows.stop))
        source_P, target_P, pairs_P2 = _pairs(batch, tokens)
        if not len(source_P):
            continue
        with torch.inference_mode(), network.record() as recording:
            network(batch.to(model.device), hidden_layer=-1)
            q, k, *_ = recording.attention[hidden_layer]
            probs_P = ops.attention_scores(
                q, k, batch.cu_seqlens, pairs=torch.from_numpy(pairs_P2).to(model.device), head_mean=True
            )
        length_P = batch.lengths_B.numpy()[batch.cell_of_token_T().numpy()[pairs_P2[:, 0]]]
        edges.add(source_P, target_P, probs_P.cpu().numpy().astype(np.float64) * length_P)
    return edges


def _pairs(
    batch: CellBatch, tokens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For all pairs of network genes in the same cell: source and target gene numbers, and (target, source) token indices."""
    ids_T = batch.gene_ids_T.numpy()
    gene_T = np.searchsorted(tokens, ids_T).clip(max=len(tokens) - 1)
    chosen_T = np.flatnonzero(tokens[gene_T] == ids_T)
    values_T = batch.values_T
    if values_T is not None:
        chosen_T = chosen_T[values_T.numpy()[chosen_T] > 0]
    cell_T = batch.cell_of_token_T().numpy()[chosen_T]
    found: list[NDArray[np.int64]] = []
    for tokens_of_cell in np.split(chosen_T, np.flatnonzero(np.diff(cell_T)) + 1):
        target, source = np.meshgrid(tokens_of_cell, tokens_of_cell, indexing="ij")
        other = target != source
        found.append(np.stack([target[other], source[other]], 1))
    pairs_P2 = np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)
    return gene_T[pairs_P2[:, 1]], gene_T[pairs_P2[:, 0]], pairs_P2


def deletion_edges(model: Model, cells: CellBatch, tokens: NDArray[np.int64], hidden_layer: int) -> Edges:
    """Edges whose weight is the shift of the target's hidden vector when the source is deleted."""
    editor = Editor.of(model.encoding, "delete")
    edges = Edges.none(len(tokens))
    for number in range(len(cells)):
        cell = cell_of(cells, number)
        present = np.intersect1d(editor.expressed(cell), tokens).tolist()
        if len(present) < 2:
            continue
        variants = [cell, *(editor.edit(cell, [gene]) for gene in present)]
        states = _states_of(model, variants, present, hidden_layer)
        rows = np.searchsorted(tokens, present)
        for source, after in enumerate(states[1:]):
            # A deleted gene has no hidden vector in the variant.
            targets = [row for row in range(len(present)) if row != source]
            edges.add(rows[source], rows[targets], cosine_distance(states[0][targets], after[targets]))
    return edges


def _states_of(model: Model, variants: list[Any], genes: list[int], hidden_layer: int) -> list[NDArray[np.float32]]:
    """Hidden vectors of the given genes in each variant of a cell, (genes, D) each; zeros for a gene that is missing."""
    found = []
    per_batch = max(1, TOKENS_PER_BATCH // len(variants[0]))
    for start in range(0, len(variants), per_batch):
        part = variants[start : start + per_batch]
        with torch.inference_mode():
            states_TD = model.network(pack(part).to(model.device), hidden_layer=hidden_layer).float().cpu().numpy()
        first = 0
        for variant in part:
            index_of = {int(gene): index for index, gene in enumerate(variant.gene_ids_N)}
            states = np.zeros((len(genes), states_TD.shape[1]), np.float32)
            for row, gene in enumerate(genes):
                if gene in index_of:
                    states[row] = states_TD[first + index_of[gene]]
            found.append(states)
            first += len(variant)
    return found


def edge_table(found: Edges, null: Edges, names: list[str], min_cells: int) -> pd.DataFrame:
    """Compare each edge with its mean in shuffled cells by Student's t-test; under the null, both variances are equal."""
    kept = (found.n_GG >= min_cells) & (null.n_GG >= min_cells) & ~np.eye(len(names), dtype=bool)
    source, target = np.nonzero(kept)
    mean_E, std_E, n_E = found.mean_GG[kept], found.std_GG[kept], found.n_GG[kept]
    null_mean_E, null_std_E, null_n_E = null.mean_GG[kept], null.std_GG[kept], null.n_GG[kept]
    n_free_E = n_E + null_n_E - 2.0
    with np.errstate(divide="ignore", invalid="ignore"):  # edges that are the same in all cells
        variance_E = ((n_E - 1) * std_E**2 + (null_n_E - 1) * null_std_E**2) / n_free_E
        t_E = (mean_E - null_mean_E) / np.sqrt(variance_E * (1 / n_E + 1 / null_n_E))
    columns = {
        "n_cells": n_E,
        "weight": mean_E,
        "null_mean": null_mean_E,
        "null_std": null_std_E,
        "z": t_E,
        "p_value": 2 * special.stdtr(n_free_E, -np.abs(t_E)),
    }
    ends = {"source": np.array(names)[source], "target": np.array(names)[target]}
    table = pd.DataFrame({**ends, **columns})
    table["fdr"] = false_discovery_rate(table["p_value"].to_numpy())
    return table.sort_values("z", ascending=False, kind="stable", ignore_index=True)


def attention(
    adata: anndata.AnnData,
    model: Model,
    genes: Sequence[str],
    *,
    hidden_layer: int = -1,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
) -> pd.DataFrame:
    """Table of the attention between chosen genes; `scfm.tl.attention` explains it."""
    genes = list(genes)
    if len(genes) < 2 or len(set(genes)) < len(genes):
        raise ValueError(f"`genes` is {genes}; name at least two genes, each once.")
    token_G = np.asarray(model.encoding.vocabulary.require(genes), dtype=np.int64)
    order_G = np.argsort(token_G)
    cells = pp.encode(adata, model.encoding, layer=layer, gene_key=gene_key, depth_key=depth_key, empty="keep")
    edges = attention_edges(model, cells, token_G[order_G], hidden_layer)
    back_G = np.argsort(order_G)
    attention_GG = np.where(edges.n_GG > 0, edges.mean_GG, np.nan)[np.ix_(back_G, back_G)]
    return pd.DataFrame(attention_GG.T, index=pd.Index(genes, name="query"), columns=pd.Index(genes, name="key"))
