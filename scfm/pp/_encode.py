"""`scfm.pp.encode`: a whole AnnData to packed tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from scfm._docs import document
from scfm.data.batch import CellBatch
from scfm.data.matrix import BLOCK_ROWS, CountMatrix, require_adata
from scfm.encoding.base import Backend, Encoding
from scfm.encoding.genes import GeneMap
from scfm.errors import EmptyCellError
from scfm.families.loading import opened


@document
def encode(
    adata: Any,
    model_or_encoding: Any,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    empty: Literal["error", "keep"] = "error",
    rng: np.random.Generator | None = None,
    backend: Backend = "auto",
) -> CellBatch:
    """Encode every cell as tokens.

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes: dense, CSR, CSC, backed or a view. It is left unchanged.
    model_or_encoding
        An encoding, or a model whose encoding is used.
    {layer}
    {gene_key}
    {depth_key}
    empty
        What to do with cells that express no gene of the vocabulary: "error", or "keep" them without gene tokens.
    rng
        Source of the randomness that some encodings use in training. None for deterministic tokens.
    backend
        "auto", "compiled" or "numpy"; their results are bitwise identical.

    Returns
    -------
    CellBatch of n_obs cells in their order: `gene_ids_T`, `values_T`, int64 `cu_seqlens`, `cell_index_B`, `depth_B`.

    Raises
    ------
    CountsError
        If the numbers are not raw counts.
    VocabularyMismatchError
        If the genes do not fit the vocabulary.
    EmptyCellError
        If a cell expresses no gene of the vocabulary and `empty` is "error".

    Examples
    --------
    >>> import scfm.datasets, scfm.encoding, scfm.pp
    >>> adata = scfm.datasets.pbmc()
    >>> cells = scfm.pp.encode(adata, scfm.encoding.make_encoding("rank", adata=adata))
    >>> cells.n_cells, cells.n_tokens
    (700, 174400)
    """
    if empty not in ("error", "keep"):
        raise ValueError(f"`empty` is {empty!r}; it must be 'error' or 'keep'.")
    encoding = encoding_of(model_or_encoding)
    counts = CountMatrix.from_adata(adata, layer=layer, depth_key=depth_key)
    genes = gene_map(counts, encoding, gene_key=gene_key)
    parts = [
        encoding.encode(block, genes, depth_B=depth_B, rng=rng, backend=backend)
        for _, block, depth_B in counts.blocks(BLOCK_ROWS)
    ]
    if len(parts) == 1:
        cells = parts[0]
    else:
        cells = CellBatch.concat(parts) if parts else encoding.encode(np.zeros((0, counts.n_vars)), genes)
    cells = cells.replace(cu_seqlens=cells.cu_seqlens.long(), cell_index_B=torch.arange(cells.n_cells))
    if empty == "error":
        refuse_empty(cells, encoding, adata.obs_names)
    return cells


def require_cells(adata: Any) -> None:
    """Raise `EmptyCellError` where there is nothing to work on."""
    require_adata(adata)
    if not adata.n_obs:
        raise EmptyCellError(f"The data hold no cells ({adata.n_obs} x {adata.n_vars}). Was every cell filtered out?")


def encoding_of(model_or_encoding: Any) -> Encoding:
    """Return the encoding of a model or of the path of one, or an encoding as it is."""
    if isinstance(model_or_encoding, (str, Path)):
        return opened(model_or_encoding).encoding
    encoding = getattr(model_or_encoding, "encoding", model_or_encoding)
    if not isinstance(encoding, Encoding):
        raise TypeError(
            f"`model_or_encoding` is a {type(model_or_encoding).__name__}; pass a model, which `scfm.fit` and "
            "`scfm.load` return, its path, or an encoding from `scfm.encoding.make_encoding`."
        )
    return encoding


def gene_map(counts: CountMatrix, encoding: Encoding, *, gene_key: str | None = None) -> GeneMap:
    """Map the genes of `counts`; the share of counts that is known is judged by the first cells, if they hold counts."""
    first = counts.rows(0, min(counts.n_obs, 200))
    counts.check(first)  # of what are no counts, no share is known
    return GeneMap.from_var(
        counts.var,
        encoding.vocabulary,
        gene_key=gene_key,
        duplicates=encoding.config.duplicates,
        gene_totals=np.bincount(first.indices, weights=first.data, minlength=counts.n_vars) if first.nnz else None,
    )


def refuse_empty(cells: CellBatch, encoding: Encoding, names: Any) -> None:
    """Raise `EmptyCellError` if a cell has no expressed gene.

    Where zeros get tokens, a cell is empty when all its gene values are 0; otherwise when it has special tokens only.
    """
    bare = cells.lengths_B.numpy() <= encoding.config.n_special_tokens
    if encoding.config.include_zeros and cells.values_T is not None:
        is_gene = np.zeros(len(encoding.vocabulary), dtype=bool)
        is_gene[encoding.vocabulary.gene_ids] = True
        counted_T = is_gene[cells.gene_ids_T.numpy()] & (cells.values_T.numpy() > 0)
        bare = np.bincount(cells.cell_of_token_T().numpy(), weights=counted_T, minlength=cells.n_cells) == 0
    if bare.any():
        shown = ", ".join(repr(str(name)) for name in np.asarray(names)[bare][:5])
        raise EmptyCellError(
            f"{int(bare.sum())} of {len(bare)} cells have no expressed gene that the vocabulary knows: {shown}. Filter "
            "them out: `scanpy.pp.filter_cells(adata, min_genes=1)`, on the known genes alone where they express others."
        )
