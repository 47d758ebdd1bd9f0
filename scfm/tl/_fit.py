"""`scfm.fit`: from counts to a trained model in one call."""

# Axes: B cells, G genes of the matrix, V tokens of the vocabulary, C classes.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm import baselines, pp
from scfm.data import CellBatch, CountMatrix, split_cells
from scfm.data.labels import Labels
from scfm.encoding import Encoding, EncodingConfig, GeneMap, make_encoding
from scfm.errors import LabelsError
from scfm.models.initialize import gene_loadings, set_gene_embeddings, set_linear_probe
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.models.presets import own_preset
from scfm.objectives import Classification, MaskedGenes, MaskedValues, Objective, class_weights
from scfm.tl._record import record
from scfm.train import FitConfig, train

N_COMPONENTS = 50  # of the singular value decomposition that gene embeddings start from
GENE_SCALE = 0.3  # root mean square of the loadings in the gene embedding
FINE_TUNING_RATE = 1e-4
MOST_CELLS_FOR_SVD = 20_000
MOST_CELLS_FOR_BASELINES = 20_000


def fit(
    adata: anndata.AnnData,
    *,
    labels_key: str | None = None,
    batch_key: str | None = None,
    encoding: str = "rank",
    objective: str = "masked",
    preset: str = "small",
    layer: str | None = None,
    gene_key: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    config: FitConfig | None = None,
    key_added: str = "X_scfm",
    progress: bool = True,
) -> Model:
    """Train a model on raw counts: self-supervised, then, with `labels_key`, to tell labels apart.

    With labels, a part of the labelled cells is held out from everything that is fitted (vocabulary, medians,
    pretraining, classification), and the model is scored on it beside simple baselines: `model.report()`.

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes, in `X` or in `layer`.
    labels_key
        Column of `adata.obs` with cell types. Cells without a label (NaN) take part in pretraining only.
    batch_key
        Column of `adata.obs` with donors or batches; then whole ones are held out instead of single cells.
    encoding
        "rank": genes in order of their expression over their usual one (Geneformer). "bin": genes with binned
        values (scGPT).
    objective
        "masked": guess hidden genes (rank) or hidden values (bin).
    preset
        Size of the network: "small", "medium" or "large".
    layer, gene_key
        As in `scfm.tl.embed`.
    test_fraction
        Share of the labelled cells to hold out. A class of one cell is never held out.
    seed
        Of the split, the initialisation, the order of cells, masks and dropout. The same seed gives the same model on
        one machine.
    config
        Settings of training; by default they follow from the size of the data.
    key_added
        Where the embedding goes in `adata.obsm`.
    progress
        Whether to show a progress bar with loss, cells per second and time left.

    Returns
    -------
    The model. Writes `obsm[key_added]`, shape (n_obs, d_model), float32, with labels also `obs["scfm_split"]`
    ("train", "test", "unlabelled"), and a record under `uns["scfm"]`.

    Raises
    ------
    CountsError
        If the matrix holds no raw counts; the message says where they may be.
    LabelsError
        If `labels_key` is missing, or there are too few classes or cells.
    EmptyCellError
        If a cell has no expressed gene.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> adata.obsm["X_scfm"].shape
    (700, 128)
    """
    if objective != "masked":
        raise ValueError(f"`objective` is {objective!r}; choose 'masked'.")
    chosen = own_preset(preset, encoding)
    split = _split(adata, labels_key, batch_key, test_fraction, seed)
    fitted = make_encoding(EncodingConfig(**chosen.encoding), adata=adata[split.fitted], layer=layer, gene_key=gene_key)
    cells = pp.encode(adata, fitted, layer=layer, gene_key=gene_key)
    network = _start(chosen.model_config(**_of_vocabulary(fitted)), fitted, seed)
    expression_BV = _token_expression(adata[split.fitted], fitted, layer, gene_key, seed)
    set_gene_embeddings(network, gene_loadings(expression_BV, N_COMPONENTS, seed), scale=GENE_SCALE)
    model = Model(network, fitted, history={"preset": chosen.name, "seed": seed})

    stage = config or default_config(len(split.fitted), seed)
    _run_stage(model, "pretraining", _pretraining(network, fitted), cells.select(split.fitted), stage, progress)
    if split.labels is not None:
        _fine_tune(model, cells, split, config, seed, progress)
        model.history["report"] = _score(model, adata, cells, split, layer, seed)
        adata.obs["scfm_split"] = split.names(adata.n_obs)
    adata.obsm[key_added] = model.embed(cells)
    record(adata, model, key_added, layer=layer, gene_key=gene_key, labels_key=labels_key, batch_key=batch_key)
    return model


@dataclass(frozen=True)
class _FitSplit:
    """Rows by the part they play; `fitted` is every row that is not held out."""

    labels: Labels | None
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    fitted: NDArray[np.int64]

    def names(self, n_obs: int) -> pd.Categorical:
        part = np.full(n_obs, "unlabelled", dtype=object)
        part[self.train], part[self.test] = "train", "test"
        return pd.Categorical(part, categories=["train", "test", "unlabelled"])


def _split(
    adata: anndata.AnnData, labels_key: str | None, batch_key: str | None, test_fraction: float, seed: int
) -> _FitSplit:
    every = np.arange(adata.n_obs)
    if labels_key is None:
        return _FitSplit(None, every[:0], every[:0], every)
    labels = Labels.from_obs(adata.obs, labels_key)
    if batch_key is not None and batch_key not in adata.obs:
        raise LabelsError(f"`batch_key` is {batch_key!r}, which is not in `adata.obs` ({', '.join(adata.obs)}).")
    labelled = labels.labelled
    groups = None if batch_key is None else adata.obs[batch_key].astype(str).to_numpy()[labelled]
    parts = split_cells(labels=labels.codes[labelled], groups=groups, test_fraction=test_fraction, seed=seed)
    train, test = labelled[parts.train], labelled[parts.test]
    return _FitSplit(labels, train, test, np.setdiff1d(every, test))


def _start(model_config: Any, encoding: Encoding, seed: int) -> CellTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CellTransformer.for_vocabulary(model_config, encoding.vocabulary)


def _of_vocabulary(encoding: Encoding) -> dict[str, Any]:
    return {"n_tokens": len(encoding.vocabulary), "pad_id": encoding.vocabulary.pad_id}


def _token_expression(
    adata: anndata.AnnData, encoding: Encoding, layer: str | None, gene_key: str | None, seed: int
) -> sparse.csr_matrix:
    """log1p counts per 10,000 by token id, shape (B, V), of at most `MOST_CELLS_FOR_SVD` cells."""
    if adata.n_obs > MOST_CELLS_FOR_SVD:
        chosen = np.random.default_rng(seed).choice(adata.n_obs, MOST_CELLS_FOR_SVD, replace=False)
        adata = adata[np.sort(chosen)]
    genes = GeneMap.from_var(adata.var, encoding.vocabulary, gene_key=gene_key, min_coverage=0)
    expression_BG = _log_normalized(CountMatrix.from_adata(adata, layer=layer)).tocoo()
    token_N = genes.token_ids[expression_BG.col]
    known = token_N >= 0
    return sparse.csr_matrix(
        (expression_BG.data[known], (expression_BG.row[known], token_N[known])),
        shape=(adata.n_obs, len(encoding.vocabulary)),
    )


def _log_normalized(counts: CountMatrix) -> sparse.csr_matrix:
    blocks, depths = zip(*((block, depth_B) for _, block, depth_B in counts.blocks()))
    return baselines.log_normalize(sparse.vstack(blocks, format="csr"), np.concatenate(depths))


def _pretraining(network: CellTransformer, encoding: Encoding) -> Objective:
    if encoding.config.kind == "rank":
        mask_id = encoding.vocabulary.mask_id
        assert mask_id is not None  # built with one
        return MaskedGenes(mask_id=mask_id, is_gene_V=network.is_gene_V.cpu())
    return MaskedValues(is_gene_V=network.is_gene_V.cpu())


def default_config(n_cells: int, seed: int) -> FitConfig:
    """Steps that grow with the square root of the data: 100 for a few hundred cells, 2,000 for a million."""
    return FitConfig(n_steps=int(np.clip(4 * np.sqrt(n_cells), 100, 4000)), seed=seed)


def _fine_tune(
    model: Model, cells: CellBatch, split: _FitSplit, config: FitConfig | None, seed: int, progress: bool
) -> None:
    assert split.labels is not None
    labels_B = torch.from_numpy(split.labels.codes)
    train_cells = cells.replace(labels_B=labels_B).select(split.train)
    train_labels_B = labels_B[split.train]
    embedding_BD = model.embed(train_cells)
    model.labels = split.labels.names
    model.network.add_class_head(len(model.labels))
    set_linear_probe(model.network, embedding_BD, train_labels_B.numpy())
    objective = Classification(class_weights_C=class_weights(train_labels_B, len(model.labels)))
    stage = config or default_config(len(split.train), seed).replace(learning_rate=FINE_TUNING_RATE)
    _run_stage(model, "fine-tuning", objective, train_cells, stage, progress)
    model.network.class_head.set_statistics(torch.from_numpy(model.embed(train_cells)))


def _run_stage(
    model: Model, name: str, objective: Objective, cells: CellBatch, config: FitConfig, progress: bool
) -> None:
    module = train(model.network, objective, cells, config, title=name, progress=progress)
    losses = [float(loss) for loss in module.losses]
    stages = model.history.setdefault("stages", [])
    stages.append({"name": name, "objective": objective.name, "config": config.to_dict(), "losses": losses})


def _score(
    model: Model, adata: anndata.AnnData, cells: CellBatch, split: _FitSplit, layer: str | None, seed: int
) -> list[dict[str, Any]]:
    """Score the model and the baselines on the held-out cells, rows as `model.report` returns them."""
    assert split.labels is not None
    names = np.asarray(split.labels.names)
    truth = names[split.labels.codes[split.test]]
    predicted = names[model.predict_proba(cells.select(split.test)).argmax(1)]
    rows = [{"method": "scfm", **baselines.scores(truth, predicted)}]
    train = split.train
    if len(train) > MOST_CELLS_FOR_BASELINES:
        train = np.sort(np.random.default_rng(seed).choice(train, MOST_CELLS_FOR_BASELINES, replace=False))
    expression = [_log_normalized(CountMatrix.from_adata(adata[rows], layer=layer)) for rows in (train, split.test)]
    table = baselines.score_annotation_baselines(
        expression[0], names[split.labels.codes[train]], expression[1], truth, seed=seed
    )
    return rows + table.reset_index().to_dict("records")
