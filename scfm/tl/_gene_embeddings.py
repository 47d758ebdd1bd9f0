"""`scfm.tl.gene_embeddings`."""

# Axes: T packed tokens, V tokens of the vocabulary, D model width.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

from scfm import pp
from scfm._docs import document
from scfm.data import CellBatch
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.pp._encode import require_cells
from scfm.vocab import Vocabulary


@document
def gene_embeddings(
    adata: anndata.AnnData | None,
    model: Model | str | Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    hidden_layer: int | None = None,
    min_cells: int = 1,
    precision: Precision = "fp32",
    progress: bool = True,
) -> pd.DataFrame:
    """Return a table of gene embeddings: the mean hidden vector of each gene's token over the cells that contain it.

    Parameters
    ----------
    adata
        AnnData with raw counts. None for the input embeddings of the genes, which do not depend on cells.
    {model}
    {layer}
    {gene_key}
    {depth_key}
    hidden_layer
        Index of the layer whose output is averaged; -1 is the last. None for the setting of the model: -2 for published
        Geneformer models, the output of the decoder for scFoundation.
    min_cells
        Minimum number of cells in which a gene must be a token. Other genes are omitted.
    {precision}
    {progress}

    Returns
    -------
    One row per gene, named as in the vocabulary, and one column per dimension, float32. If the vocabulary has Ensembl ids and
    their symbols, `attrs["symbols"]` maps each gene to its symbol.

    Raises
    ------
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix does not hold raw counts, its genes do not match the model, or a cell expresses no gene of the model.
    IndexError
        If `hidden_layer` is out of range.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.gene_embeddings(adata, model, min_cells=10).shape[1]
    128
    """
    model = opened(model)
    vocabulary = model.encoding.vocabulary
    gene_ids = torch.from_numpy(vocabulary.gene_ids).to(model.device)
    if adata is None:
        with torch.inference_mode():
            embedding_GD = model.network.embedding.genes(gene_ids).float().cpu().numpy()
        return _table(embedding_GD, vocabulary.genes, vocabulary)
    require_cells(adata)
    encoding = model.encoding
    if model.network.decoder is not None and hidden_layer is None:  # the decoder has states of all genes
        encoding = encoding.replace(include_zeros=True)
    cells = pp.encode(adata, encoding, layer=layer, gene_key=gene_key, depth_key=depth_key)
    sum_VD, count_V = _sums(model, cells, hidden_layer, precision, progress)
    kept = [gene for gene in vocabulary.gene_ids.tolist() if count_V[gene] >= max(min_cells, 1)]
    mean_GD = (sum_VD[kept] / count_V[kept][:, None]).astype(np.float32)
    return _table(mean_GD, [vocabulary.tokens[gene] for gene in kept], vocabulary)


def _table(embedding_GD: np.ndarray, genes: Sequence[str], vocabulary: Vocabulary) -> pd.DataFrame:
    """Embeddings as a table; symbols are an attribute, because all columns are numbers."""
    table = pd.DataFrame(embedding_GD, index=pd.Index(genes, name="gene"))
    if (symbols := vocabulary.symbols(genes)) is not None:
        table.attrs["symbols"] = dict(zip(genes, symbols))
    return table


@torch.no_grad()
def _sums(
    model: Model, cells: CellBatch, hidden_layer: int | None, precision: Precision, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the states of each token, shape (V, D), float64, and their number, shape (V,)."""
    network, n_tokens = model.network_in(precision), len(model.encoding.vocabulary)
    layer = model.network.config.pooling.hidden_layer if hidden_layer is None else hidden_layer
    sum_VD: torch.Tensor | None = None
    for batch in model.batches(cells, title="embedding genes", progress=progress):
        decoded = hidden_layer is None and network.decoder is not None
        states_TD = network.value_states(batch) if decoded else network(batch, hidden_layer=layer)
        if sum_VD is None:
            sum_VD = torch.zeros(n_tokens, states_TD.shape[1], dtype=torch.float64)
        sum_VD.index_add_(0, batch.gene_ids_T.long().cpu(), states_TD.double().cpu())
    count_V = np.bincount(cells.gene_ids_T.numpy(), minlength=n_tokens)
    assert sum_VD is not None, "pp.encode refuses an empty AnnData"
    return sum_VD.numpy(), count_V
