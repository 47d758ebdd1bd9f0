"""What gene embeddings say: which genes are alike, and whether they tell classes of genes apart."""

# Axes: G genes, D model width.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scfm import baselines
from scfm.data import CountMatrix
from scfm.encoding.genes import gene_names
from scfm.errors import LabelsError, VocabularyMismatchError


def similar_genes(embeddings: pd.DataFrame, genes: Sequence[str], *, n_genes: int = 10) -> pd.DataFrame:
    """Find the genes whose embeddings are most like those of given genes.

    Parameters
    ----------
    embeddings
        A row a gene, as from `scfm.tl.gene_embeddings`.
    genes
        Genes to search for.
    n_genes
        How many to return for each.

    Returns
    -------
    A row a pair: `gene`, `similar`, `cosine` (of embeddings minus their mean, which all genes share), and as a baseline
    `cosine_baseline`, the mean cosine of the gene with all others.

    Raises
    ------
    VocabularyMismatchError
        If a gene has no embedding.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> embeddings = scfm.tl.gene_embeddings(adata[:50], model)
    >>> scfm.tl.similar_genes(embeddings, ["CD79A"], n_genes=3).shape
    (3, 4)
    """
    if missing := [gene for gene in genes if gene not in embeddings.index]:
        raise VocabularyMismatchError(
            f"{len(missing)} of {len(genes)} genes have no embedding: {', '.join(map(repr, missing[:5]))}. Names are "
            f"case-sensitive; `embeddings` holds {len(embeddings)} genes, such as {embeddings.index[0]!r}."
        )
    centred_GD = embeddings.to_numpy(dtype=np.float64)
    centred_GD = centred_GD - centred_GD.mean(0)
    centred_GD /= np.maximum(np.linalg.norm(centred_GD, axis=1, keepdims=True), 1e-300)
    parts = []
    for gene in genes:
        place = int(embeddings.index.get_loc(gene))
        cosine_G = centred_GD @ centred_GD[place]
        order = np.argsort(-cosine_G, kind="stable")
        others = order[order != place]
        best = others[:n_genes]
        parts.append(
            pd.DataFrame(
                {
                    "gene": gene,
                    "similar": embeddings.index[best],
                    "cosine": cosine_G[best],
                    "cosine_baseline": cosine_G[others].mean(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def classify_genes(
    embeddings: pd.DataFrame,
    labels: Mapping[str, str],
    adata: anndata.AnnData,
    *,
    n_folds: int = 5,
    layer: str | None = None,
    gene_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Cross-validate a classifier of genes on their embeddings, beside baselines that know expression levels only.

    Parameters
    ----------
    embeddings
        A row a gene, as from `scfm.tl.gene_embeddings`.
    labels
        Class of each gene; genes without an embedding are left out.
    adata
        Raw counts, for the baselines.
    n_folds
        Folds, stratified by class; the same for all methods.
    layer, gene_key
        As in `scfm.tl.embed`.
    seed
        Of the folds.

    Returns
    -------
    A row a method: "scfm gene embedding", and "expression level" (log mean, share of cells, log variance) and "majority
    class" beside it; `accuracy`, `macro_f1`, `balanced_accuracy` over all genes, each predicted from the other folds.

    Raises
    ------
    LabelsError
        If there are fewer than two classes, or a class has fewer genes than there are folds.

    Examples
    --------
    Ribosomal proteins beside all other genes:

    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> embeddings = scfm.tl.gene_embeddings(adata[:50], model)
    >>> labels = {gene: "ribosome" if gene.startswith(("RPL", "RPS")) else "other" for gene in embeddings.index}
    >>> list(scfm.tl.classify_genes(embeddings, labels, adata, n_folds=2).index)
    ['scfm gene embedding', 'expression level', 'majority class']
    """
    names, _ = gene_names(adata.var, gene_key=gene_key)
    column_of = {str(name): column for column, name in enumerate(names)}
    genes = [gene for gene in embeddings.index if gene in labels and gene in column_of]
    classes = np.array([labels[gene] for gene in genes], dtype=object).astype(str)
    kinds, counts = np.unique(classes, return_counts=True)
    if len(kinds) < 2 or counts.min() < n_folds:
        found = ", ".join(f"{kind!r}: {count}" for kind, count in zip(kinds, counts))
        raise LabelsError(
            f"The labelled genes with embeddings are {{{found}}}; {n_folds} folds need two classes or more of at least "
            f"{n_folds} genes. Label more genes, or lower `n_folds`."
        )
    level_G3 = _levels(adata, layer)[[column_of[gene] for gene in genes]]
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    logistic = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000, C=0.1))
    methods = {
        "scfm gene embedding": (logistic, embeddings.loc[genes].to_numpy(dtype=np.float64)),
        "expression level": (logistic, level_G3),
        "majority class": (DummyClassifier(strategy="most_frequent"), level_G3),
    }
    rows = {}
    for name, (classifier, features) in methods.items():
        predicted = cross_val_predict(classifier, features, classes, cv=folds)
        rows[name] = {
            "accuracy": accuracy_score(classes, predicted),
            "macro_f1": f1_score(classes, predicted, average="macro", zero_division=0),
            "balanced_accuracy": balanced_accuracy_score(classes, predicted),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _levels(adata: anndata.AnnData, layer: str | None) -> NDArray[np.float64]:
    """Log mean, share of cells, log variance of each column's log-normalised counts, shape (G, 3)."""
    matrix = CountMatrix.from_adata(adata, layer=layer)
    blocks, depths = zip(*((block, depth_B) for _, block, depth_B in matrix.blocks()))
    expression_BG = baselines.log_normalize(sparse.vstack(blocks, format="csr"), np.concatenate(depths))
    mean_G = np.asarray(expression_BG.mean(0), dtype=np.float64).ravel()
    square_G = np.asarray(expression_BG.multiply(expression_BG).mean(0), dtype=np.float64).ravel()
    share_G = np.asarray((expression_BG > 0).mean(0), dtype=np.float64).ravel()
    return np.stack([np.log(mean_G + 1e-6), share_G, np.log((square_G - mean_G**2).clip(min=0) + 1e-6)], 1)
