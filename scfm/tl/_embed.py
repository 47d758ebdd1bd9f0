"""`scfm.tl.embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np

from scfm._docs import document
from scfm.families.loading import opened
from scfm.models.inference import cell_bar
from scfm.models.model import Model, Precision
from scfm.pp._encode import encoded_blocks, require_cells
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
    progress: bool = True,
    copy: bool = False,
) -> anndata.AnnData | None:
    """Embed every cell.

    The embedding of a cell does not depend on the other cells, their order or the batch size. On one type of CPU it is
    identical to the last bit.

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
    {progress}
    {copy}

    Returns
    -------
    None, or the copy. Writes `obsm[key_added]`, shape (n_obs, d_model), float32 (four times as wide for pooling "concat"),
    and a record of model and settings to `uns["scfm"]`.

    Raises
    ------
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix does not hold raw counts, its genes do not match the model, or a cell expresses no gene of the model.
    ModelFileError
        If `model` is a path or a name that cannot be opened.
    ValueError, IndexError
        If `pooling` or `precision` is unknown, or `hidden_layer` is out of range.
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
    source: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "depth_key": depth_key}
    how: dict[str, Any] = {
        "hidden_layer": hidden_layer,
        "pooling": pooling,
        "normalize": normalize,
        "precision": precision,
    }
    with (
        encoded_blocks(adata, model.encoding, **source) as blocks,
        cell_bar(adata.n_obs, "embedding", progress=progress) as bar,
    ):
        parts = [model.embed(block.cells, progress=bar, **how) for block in blocks]
    adata.obsm[key_added] = np.concatenate(parts)
    record(adata, model, key_added, **source, **how)
    return adata if copy else None
