"""Search for genes with similar embeddings, and classification of genes."""

# Axes: G genes, D model width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

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
from scfm._config import require_seed
from scfm._docs import document
from scfm.data import CellBatch, CountSource
from scfm.errors import LabelsError, VocabularyMismatchError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.tl._gene_embeddings import gene_embeddings
from scfm.vocab import strip_version

if TYPE_CHECKING:
    from scfm.train import FitConfig

Value = TypeVar("Value")


def similar_genes(embeddings: pd.DataFrame, genes: Sequence[str], *, n_genes: int = 10) -> pd.DataFrame:
    """Return the genes with the most similar embeddings for each of the given genes.

    Parameters
    ----------
    embeddings
        Table from `scfm.tl.gene_embeddings`.
    genes
        List of genes, as named in the table, or by their symbols in `embeddings.attrs["symbols"]`.
    n_genes
        Number of similar genes to return for each gene.

    Returns
    -------
    One row per pair: `gene`, `similar`, `cosine`, the cosine similarity after the mean over all genes is subtracted, and, for
    comparison, `cosine_baseline`, the mean of this similarity between the gene and all others. If the table has symbols, also
    `symbol` and `similar_symbol`.

    Raises
    ------
    VocabularyMismatchError
        If a gene has no embedding.
    ValueError
        If `genes` is a string and not a list.

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
        raise ValueError(f"`genes` is the string {genes!r}; pass a list of names, such as [{genes!r}].")
    symbols: Mapping[str, str] = embeddings.attrs.get("symbols", {})
    named = {symbol: gene for gene, symbol in symbols.items() if gene in embeddings.index}
    genes = [gene if gene in embeddings.index else named.get(gene, gene) for gene in genes]
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
    table = pd.concat(parts, ignore_index=True)
    if symbols:
        table.insert(1, "symbol", table["gene"].map(symbols))
        table.insert(3, "similar_symbol", table["similar"].map(symbols))
    return table


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
    """Cross-validate classifiers of genes: on gene embeddings, by fine-tuning, and, for comparison, on expression levels.

    Parameters
    ----------
    embeddings
        Table from `scfm.tl.gene_embeddings`. None to compute it from `adata` and `model`.
    labels
        Class of each gene, by its name in the table or its symbol. Genes without an embedding or without a column in `adata` are
        omitted; with `finetune`, also genes that are not a token of any cell.
    adata
        AnnData with raw counts, for the baselines and for fine-tuning.
    model
        Model (or its path) for gene embeddings or fine-tuning. It is not changed.
    finetune
        Whether a copy of the model is also fine-tuned in each fold to classify the tokens of the training genes, as in
        Geneformer. Genes of the test fold have no label in training.
    config
        Settings of fine-tuning. None for 60 steps, on all weights if the model has at most 20 million parameters, otherwise
        on low-rank updates ("lora:8").
    n_folds
        Number of folds, which are stratified by class and the same for all methods.
    {layer}
    {gene_key}
    {depth_key}
    seed
        Seed of the folds; also of fine-tuning, unless `config` has a seed.
    {progress}

    Returns
    -------
    One row per method: "scfm fine-tuned" (with `finetune`), "scfm gene embedding" (a linear probe), "expression level" (log
    mean, fraction of cells that express the gene, log variance) and "majority class". The columns `accuracy`, `macro_f1` and
    `balanced_accuracy` are computed over all genes; each gene is predicted by a classifier of the other folds.

    Raises
    ------
    LabelsError
        If there are fewer than two classes, or a class has fewer genes than there are folds.
    ValueError
        If `model` is needed and is None.
    CountsError, VocabularyMismatchError, EmptyCellError
        If the matrix does not hold raw counts, its genes do not match `model`, or a cell expresses no gene of `model`.

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
    require_seed(seed)
    if model is None and (finetune or embeddings is None):
        raise ValueError("`model` is None. Pass a model for gene embeddings or fine-tuning.")
    model = None if model is None else opened(model)
    if embeddings is None:
        assert model is not None
        embeddings = gene_embeddings(adata, model, layer=layer, gene_key=gene_key, depth_key=depth_key)
    expression_BG, names = CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key).log_normalized()
    column_of = _by_gene(embeddings, {name: column for column, name in enumerate(names)})
    class_of = _by_gene(embeddings, labels)
    usable, cells = column_of.keys() & class_of.keys(), None
    if finetune and model is not None:
        cells = pp.encode(adata, model, layer=layer, gene_key=gene_key, depth_key=depth_key)
        usable &= _tokens_of(cells, model)
    genes = [gene for gene in embeddings.index if gene in usable]
    classes = np.array([class_of[gene] for gene in genes], dtype=object).astype(str)
    _require_classes(classes, n_folds)
    level_G3 = _levels(expression_BG)[[column_of[gene] for gene in genes]]
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    rows = {}
    if cells is not None and model is not None:
        from scfm.annotation.genes import cross_validate_genes  # loads Lightning

        kinds, codes_G = np.unique(classes, return_inverse=True)
        gene_ids_G, splits = model.encoding.vocabulary.require(genes).astype(np.int64), folds.split(level_G3, classes)
        predicted_G = cross_validate_genes(
            model,
            cells,
            gene_ids_G=gene_ids_G,
            codes_G=codes_G,
            folds=splits,
            config=config,
            seed=seed,
            progress=progress,
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


def _by_gene(embeddings: pd.DataFrame, values: Mapping[str, Value]) -> dict[str, Value]:
    """Values of the genes of the table; in `values`, a gene has its name, its name without version, or its symbol."""
    symbols, found = embeddings.attrs.get("symbols", {}), {}
    for gene in embeddings.index:
        name = next((name for name in (gene, strip_version(gene), symbols.get(gene)) if name in values), None)
        if name is not None:
            found[gene] = values[name]
    return found


def _tokens_of(cells: CellBatch, model: Model) -> set[str]:
    """Return the names of the genes that are a token of at least one cell."""
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
    """Return log mean, fraction of cells and log variance of each gene's log-normalized counts, shape (G, 3)."""
    mean_G = np.asarray(expression_BG.mean(0), dtype=np.float64).ravel()
    square_G = np.asarray(expression_BG.multiply(expression_BG).mean(0), dtype=np.float64).ravel()
    fraction_G = np.asarray((expression_BG > 0).mean(0), dtype=np.float64).ravel()
    return np.stack([np.log(mean_G + 1e-6), fraction_G, np.log((square_G - mean_G**2).clip(min=0) + 1e-6)], 1)
