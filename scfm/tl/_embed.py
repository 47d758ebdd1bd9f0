"""`scfm.tl.embed`."""

from __future__ import annotations

from pathlib import Path

import anndata

from scfm import pp
from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.model import Model, Precision
from scfm.pp._encode import require_cells
from scfm.tl._record import record


@document
def embed(
    adata: anndata.AnnData,
    model: Model | str | Path,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    hidden_layer: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    precision: Precision = "fp32",
    key_added: str = "X_scfm",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed every cell.

    The embedding of a cell does not depend on the order, the batch size or the other cells (bitwise on a CPU).

    Parameters
    ----------
    {adata}
    {model}
    {layer}
    {gene_key}
    {depth_key}
    {hidden_layer}
    {pooling}
    {normalize}
    {precision}
    {obsm_key_added}
    {copy}

    Returns
    -------
    None, or the copy. Writes `obsm[key_added]`, shape (n_obs, d_model) (4 d_model for "concat"), float32, and a record under
    `uns["scfm"]`.

    Raises
    ------
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix holds no raw counts, its genes are not those of the model, or a cell has none of them.
    ModelFileError
        If `model` is a path or a name that cannot be opened.
    ValueError, IndexError
        If `pooling` or `precision` is unknown, or the network has no `hidden_layer` of this number.
    TypeError
        If `adata` is not an AnnData.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.embed(adata, model)
    >>> adata.obsm["X_scfm"].shape
    (700, 128)
    """
    require_cells(adata)
    model = opened(model)
    adata = adata.copy() if copy else adata
    cells = pp.encode(adata, model, layer=layer, gene_key=gene_key, depth_key=depth_key)
    how = {"hidden_layer": hidden_layer, "pooling": pooling, "normalize": normalize, "precision": precision}
    adata.obsm[key_added] = model.embed(cells, **how)  # type: ignore[arg-type]
    record(adata, model, key_added, layer=layer, gene_key=gene_key, depth_key=depth_key, **how)
    return adata if copy else None
