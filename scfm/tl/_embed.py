"""`scfm.tl.embed`."""

from __future__ import annotations

import anndata

from scfm import pp
from scfm.models.model import Model, Precision
from scfm.tl._record import record


def embed(
    adata: anndata.AnnData,
    model: Model,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    hidden_layer: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    precision: Precision = "fp32",
    key_added: str = "X_scfm",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed every cell.

    A cell gets the same numbers whatever the order, the batch size and the other cells are (to the bit on the CPU).

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes, in `X` or in `layer`.
    model
        From `scfm.fit` or `scfm.load`.
    layer
        Layer that holds the counts; "raw" for `adata.raw`.
    gene_key
        Column of `adata.var` with the gene names or ids that the vocabulary uses; None for `var_names`.
    hidden_layer
        Hidden state to pool, indexed as Python does: -1 the last; None for the family's (-2 for Geneformer).
    pooling
        "mean" or "max" over the gene tokens, "cls", or "concat" (scFoundation: source depth, target depth, max, mean);
        None for the family's.
    normalize
        Whether to divide each embedding by its length; None for as published (scGPT does).
    precision
        "fp32", or "bf16" for several times the speed, at a cosine similarity above 0.999.
    key_added
        Where the embedding goes in `adata.obsm`.
    copy
        Return a copy with the result instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Writes `obsm[key_added]`, shape (n_obs, d_model) (4 d_model for "concat"), float32, and a record under `uns["scfm"]`.

    Raises
    ------
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix holds no raw counts, its genes are not those of the model, or a cell has none of them.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.embed(adata, model)
    >>> adata.obsm["X_scfm"].shape
    (700, 128)
    """
    adata = adata.copy() if copy else adata
    cells = pp.encode(adata, model, layer=layer, gene_key=gene_key)
    how = {"hidden_layer": hidden_layer, "pooling": pooling, "normalize": normalize, "precision": precision}
    adata.obsm[key_added] = model.embed(cells, **how)  # type: ignore[arg-type]
    record(adata, model, key_added, layer=layer, gene_key=gene_key, **how)
    return adata if copy else None
