"""Similar genes by their embeddings, and classification of genes."""

# Axes: G genes, D model width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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

from scfm import pp
from scfm._docs import document
from scfm.data import CellBatch, CountSource
from scfm.errors import LabelsError, VocabularyMismatchError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.tl._gene_embeddings import gene_embeddings
from scfm.vocab import strip_version

if TYPE_CHECKING:
    from scfm.train import FitConfig


def similar_genes(embeddings: pd.DataFrame, genes: Sequence[str], *, n_genes: int = 10) -> pd.DataFrame:
    """Table of the genes whose embeddings are most similar to those of given genes.

    Parameters
    ----------
    embeddings
        One row per gene, from `scfm.tl.gene_embeddings`.
    genes
        List of the genes to search for.
    n_genes
        Number of similar genes to return for each gene.

    Returns
    -------
    One row per pair: `gene`, `similar`, `cosine` (of embeddings minus their mean over all genes), and, as a baseline,
    `cosine_baseline`, the mean cosine of the gene with all others.

    Raises
    ------
    VocabularyMismatchError
        If a gene has no embedding.
    ValueError
        If `genes` is a text, not a list.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> embeddings = scfm.tl.gene_embeddings(adata[:50], model)
    >>> scfm.tl.similar_genes(embeddings, ["CD79A"], n_genes=3).shape
    (3, 4)
    """
    if isinstance(genes, str):
        raise ValueError(f"`genes` is the text {genes!r}; pass a list of names, such as [{genes!r}].")
    if missing := [gene for gene in genes if gene not in embeddings.index]:
        raise VocabularyMismatchError(
            f"{len(missing)} of {len(genes)} genes have no embedding: {', '.join(map(repr, missing[:5]))}. Names are "
            f"case-sensitive; `embeddings` holds {len(embeddings)} genes, such as {embeddings.index[0]!r}."
        )
    centered_GD = embeddings.to_numpy(dtype=np.float64)
    centered_GD = centered_GD - centered_GD.mean(0)
    centered_GD /= np.maximum(np.linalg.norm(centered_GD, axis=1, keepdims=True), 1e-300)
    parts = []
    for gene in genes:
        place = int(embeddings.index.get_loc(gene))
        cosine_G = centered_GD @ centered_GD[place]
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


@document
def classify_genes(
    embeddings: pd.DataFrame | None,
    labels: Mapping[str, str],
    adata: anndata.AnnData,
    *,
    model: Model | str | Path | None = None,
    finetune: bool = False,
    config: FitConfig | None = None,
    n_folds: int = 5,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Cross-validate classifiers of genes: on their embeddings, or fine-tuned, compared with their expression levels.

    Parameters
    ----------
    embeddings
        One row per gene, as from `scfm.tl.gene_embeddings`; None to compute them from `adata` and `model`.
    labels
        Class of each gene. Genes that have no embedding, or no column in `adata`, are left out; with `finetune` also genes
        that are a token of no cell.
    adata
        Raw counts, for the baselines and for fine-tuning.
    model
        Model to fine-tune, or to embed genes with, or the path of one. It is left unchanged.
    finetune
        Whether a copy of the model is also fine-tuned in each fold, to classify the tokens of the training genes
        (Geneformer's gene classification). Genes of the test fold have no label in training.
    config
        Settings of fine-tuning. None for 60 steps on all weights; of a model with more than 20 million parameters, on
        low-rank updates ("lora:8").
    n_folds
        Folds, stratified by class; the same for all methods.
    {layer}
    {gene_key}
    {depth_key}
    seed
        Seed of the folds; also of fine-tuning, unless `config` has a seed.
    {progress}

    Returns
    -------
    One row per method: "scfm fine-tuned" with `finetune`, "scfm gene embedding" (a linear probe), "expression level" (log
    mean, fraction of cells, log variance) and "majority class". Columns `accuracy`, `macro_f1` and
    `balanced_accuracy` are over all genes, each predicted from the other folds.

    Raises
    ------
    LabelsError
        If there are fewer than two classes, or a class has fewer genes than there are folds.
    ValueError
        If `model` is needed and is None.
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix holds no raw counts, its genes are not those of `model`, or a cell has none of them.

    Examples
    --------
    Ribosomal proteins against all other genes:

    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> embeddings = scfm.tl.gene_embeddings(adata[:50], model)
    >>> labels = {gene: "ribosome" if gene.startswith(("RPL", "RPS")) else "other" for gene in embeddings.index}
    >>> list(scfm.tl.classify_genes(embeddings, labels, adata, n_folds=2).index)
    ['scfm gene embedding', 'expression level', 'majority class']
    """
    if model is None and (finetune or embeddings is None):
        raise ValueError("`model` is None; pass the model to fine-tune or to embed genes with.")
    model = None if model is None else opened(model)
    if embeddings is None:
        assert model is not None
        embeddings = gene_embeddings(adata, model, layer=layer, gene_key=gene_key, depth_key=depth_key)
    expression_BG, names = CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key).log_normalized()
    column_of = {name: column for column, name in enumerate(names)}
    usable, cells = {gene for gene in embeddings.index if strip_version(gene) in column_of}, None
    if finetune and model is not None:
        cells = pp.encode(adata, model, layer=layer, gene_key=gene_key, depth_key=depth_key)
        usable &= _tokens_of(cells, model)
    genes = [gene for gene in embeddings.index if gene in labels and gene in usable]
    classes = np.array([labels[gene] for gene in genes], dtype=object).astype(str)
    _require_classes(classes, n_folds)
    level_G3 = _levels(expression_BG)[[column_of[strip_version(gene)] for gene in genes]]
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    rows = {}
    if cells is not None and model is not None:
        from scfm.annotation.genes import cross_validate_genes  # loads Lightning

        kinds, codes_G = np.unique(classes, return_inverse=True)
        gene_ids_G, splits = model.encoding.vocabulary.require(genes).astype(np.int64), folds.split(level_G3, classes)
        predicted_G = cross_validate_genes(
            model, cells, gene_ids_G, codes_G, splits, config=config, seed=seed, progress=progress
        )
        rows["scfm fine-tuned"] = _scores(classes, kinds[predicted_G])
    logistic = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000, C=0.1))
    methods = {
        "scfm gene embedding": (logistic, embeddings.loc[genes].to_numpy(dtype=np.float64)),
        "expression level": (logistic, level_G3),
        "majority class": (DummyClassifier(strategy="most_frequent"), level_G3),
    }
    for name, (classifier, features) in methods.items():
        rows[name] = _scores(classes, cross_val_predict(classifier, features, classes, cv=folds))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _tokens_of(cells: CellBatch, model: Model) -> set[str]:
    """Names of the genes that are a token of some cell."""
    tokens = model.encoding.vocabulary.tokens
    return {tokens[token] for token in np.unique(cells.gene_ids_T.numpy()).tolist()}


def _require_classes(classes: NDArray[np.str_], n_folds: int) -> None:
    kinds, counts = np.unique(classes, return_counts=True)
    if len(kinds) < 2 or counts.min() < n_folds:
        found = ", ".join(f"{kind!r}: {count}" for kind, count in zip(kinds, counts))
        raise LabelsError(
            f"The labeled genes with embeddings are {{{found}}}; {n_folds} folds need two classes or more of at least "
            f"{n_folds} genes. Label more genes, or lower `n_folds`."
        )


def _scores(classes: NDArray[np.str_], predicted: NDArray[np.str_]) -> dict[str, float]:
    return {
        "accuracy": accuracy_score(classes, predicted),
        "macro_f1": f1_score(classes, predicted, average="macro", zero_division=0),
        "balanced_accuracy": balanced_accuracy_score(classes, predicted),
    }


def _levels(expression_BG: sparse.csr_matrix) -> NDArray[np.float64]:
    """Log mean, fraction of cells, log variance of each gene's log-normalized counts, shape (G, 3)."""
    mean_G = np.asarray(expression_BG.mean(0), dtype=np.float64).ravel()
    square_G = np.asarray(expression_BG.multiply(expression_BG).mean(0), dtype=np.float64).ravel()
    fraction_G = np.asarray((expression_BG > 0).mean(0), dtype=np.float64).ravel()
    return np.stack([np.log(mean_G + 1e-6), fraction_G, np.log((square_G - mean_G**2).clip(min=0) + 1e-6)], 1)
