"""`scfm.tl.annotate`."""

from __future__ import annotations

import anndata
import pandas as pd

from scfm import pp
from scfm.models.model import Model
from scfm.tl._record import record


def annotate(
    adata: anndata.AnnData,
    model: Model,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    key_added: str = "scfm",
    copy: bool = False,
) -> anndata.AnnData | None:
    """Give every cell the most probable of the labels that the model was fitted on.

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes, in `X` or in `layer`.
    model
        Fitted with `labels_key=`.
    layer, gene_key
        As in `scfm.tl.embed`.
    key_added
        Prefix of what is written.
    copy
        Return a copy with the result instead of writing to `adata`.

    Returns
    -------
    None, or the copy. Writes `obs["<key>_label"]` (categorical), `obs["<key>_confidence"]` (probability of that label,
    0 to 1) and `obsm["<key>_proba"]`, shape (n_obs, n_labels), float32, its columns in the order of `model.labels`.

    Raises
    ------
    ModelTaskError
        If the model was fitted without labels.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, labels_key="bulk_labels", config=scfm.FitConfig(n_steps=2), progress=False)
    >>> scfm.tl.annotate(adata, model)
    >>> adata.obs["scfm_label"].cat.categories.size
    10
    """
    model.require_labels()
    adata = adata.copy() if copy else adata
    proba_BC = model.predict_proba(pp.encode(adata, model.encoding, layer=layer, gene_key=gene_key))
    adata.obs[f"{key_added}_label"] = pd.Categorical.from_codes(proba_BC.argmax(1), categories=list(model.labels))
    adata.obs[f"{key_added}_confidence"] = proba_BC.max(1)
    adata.obsm[f"{key_added}_proba"] = proba_BC
    record(adata, model, f"{key_added}_label", layer=layer, gene_key=gene_key, labels=list(model.labels))
    return adata if copy else None
