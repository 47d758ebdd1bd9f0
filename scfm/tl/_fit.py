"""`scfm.fit`: from counts to a trained model in one call."""

# Axes: B cells, V tokens of the vocabulary, C classes.

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm import pp
from scfm.data import CellBatch
from scfm.encoding import Encoding, EncodingConfig, make_encoding
from scfm.families import choose_preset
from scfm.models.initialize import (
    gene_loadings,
    set_gene_classifier,
    set_gene_embeddings,
    set_linear_probe,
    set_vote_weights,
)
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.objectives import Classification, Objective, class_weights, make_objective
from scfm.pp._encode import require_cells
from scfm.tl._calibrate import calibrate
from scfm.tl._record import record
from scfm.tl._score import score_baselines, score_model
from scfm.tl._split import FitSplit, split_for_fit
from scfm.train import FitConfig, train

N_COMPONENTS = 50  # of the singular value decomposition that gene embeddings start from
GENE_SCALE = 0.3  # root mean square of the loadings in the gene embedding
FINE_TUNING_SHARE = 0.1  # of the learning rate: the probe that the head starts from is near its goal
MOST_CELLS_FOR_SVD = 20_000


def fit(
    adata: anndata.AnnData,
    *,
    labels_key: str | None = None,
    batch_key: str | None = None,
    test_key: str | None = None,
    transductive: bool = False,
    encoding: str | EncodingConfig = "rank",
    context_length: int | None = None,
    objective: str = "masked",
    pretrain: bool = True,
    preset: str = "small",
    layer: str | None = None,
    gene_key: str | None = None,
    test_fraction: float = 0.2,
    baselines: bool = True,
    seed: int = 0,
    config: FitConfig | None = None,
    key_added: str = "X_scfm",
    progress: bool = True,
) -> Model:
    """Train a model on raw counts: self-supervised, then, with `labels_key`, to tell labels apart.

    With labels, a part of the labelled cells is held out from everything that is fitted (vocabulary, medians,
    pretraining, components, classification), and the model is scored on it beside simple baselines: `model.report()`. A
    tenth of the rest is held out from the same, to fit the temperature that calibrates probabilities. Labels are told by
    the mean of two votes: the transformer's, and a linear classifier's, which reads genes through components that are
    learned from labelled and unlabelled cells.

    Parameters
    ----------
    adata
        Raw counts, n_obs cells by n_vars genes, in `X` or in `layer`.
    labels_key
        Column of `adata.obs` with cell types. From cells without a label (NaN) vocabulary, components and the network learn
        too; `scfm.tl.annotate` then labels them.
    batch_key
        Column of `adata.obs` with donors or batches; then whole ones are held out instead of single cells.
    test_key
        Column of `adata.obs` that is True for the cells to hold out, instead of a random part.
    transductive
        Whether held-out cells, without their labels, take part in what is learned from unlabelled cells. The report then
        says how well the cells at hand are labelled, not new ones, and its rows say "transductive".
    encoding
        "rank": genes in order of their expression over their usual one (Geneformer). "bin": genes with binned
        values (scGPT). Or an :class:`scfm.EncodingConfig` of either kind, which is taken as it is.
    context_length
        Most tokens of a cell; None for the preset's own, 1,024, or that of the given configuration. Attention costs its
        square.
    objective
        "masked": guess hidden genes (rank) or hidden values (bin). "generative": from known genes the values of all
        others (bin; scGPT).
    pretrain
        False leaves the self-supervised stage out; needs `labels_key`.
    preset
        Size of the network: "small", "medium" or "large".
    layer, gene_key
        As in `scfm.tl.embed`.
    test_fraction
        Share of the labelled cells to hold out. A class of one cell is never held out.
    baselines
        Whether to fit the simple methods that the report sets beside the model; they read up to 20,000 cells.
    seed
        Of the split, the initialisation, the order of cells, masks and dropout. The same seed gives the same model on
        one machine.
    config
        Settings of both stages of training, of which fine-tuning takes a tenth of the rate; by default they follow from
        the size of the data.
    key_added
        Where the embedding goes in `adata.obsm`.
    progress
        Whether to show a progress bar with loss, cells per second and time left.

    Returns
    -------
    The model. Writes `obsm[key_added]`, shape (n_obs, d_model), float32, with labels also `obs["scfm_split"]`
    ("train", "calibration", "test", "unlabelled"), and a record under `uns["scfm"]`.

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
    require_cells(adata)
    kind = encoding.kind if isinstance(encoding, EncodingConfig) else encoding
    chosen = choose_preset(preset, encoding=kind, objective=objective)
    settings = encoding if isinstance(encoding, EncodingConfig) else EncodingConfig(**chosen.encoding)
    settings = settings if context_length is None else settings.replace(context_length=context_length)
    split = split_for_fit(
        adata.obs, labels_key, batch_key, test_fraction, seed, test_key=test_key, transductive=transductive
    )
    fitted = make_encoding(settings, adata=adata[split.fitted], layer=layer, gene_key=gene_key)
    cells = pp.encode(adata, fitted, layer=layer, gene_key=gene_key)
    expression_BV = pp.log_expression(adata, fitted, layer=layer, gene_key=gene_key)
    network = _start(chosen.model_config(**_of_encoding(fitted)), fitted, seed)
    loadings_VR = gene_loadings(expression_BV[_sample(split.fitted, seed)], N_COMPONENTS, seed)
    set_gene_embeddings(network, loadings_VR, scale=GENE_SCALE)
    model = Model(network, fitted, history={"preset": chosen.name, "seed": seed})

    stage = config or default_config(len(split.fitted), seed)
    if pretrain:
        pretraining = make_objective(chosen.objective, network, fitted)
        _run_stage(model, "pretraining", pretraining, cells.select(split.fitted), stage, progress)
    if split.labels is not None:
        _fine_tune(model, cells, expression_BV, split, config, seed, progress)
        embedding_BD = model.class_features(cells)  # the embedding of our own presets; one pass serves all that follows
        network.class_head.set_statistics(torch.from_numpy(embedding_BD[split.train]))
        model.calibration = calibrate(model, embedding_BD, expression_BV, split)
        model.scores = score_model(model, embedding_BD, expression_BV, split)
        if baselines:
            model.scores += score_baselines(adata, split, layer, seed)
        adata.obs["scfm_split"] = split.names(adata.n_obs)
    adata.obsm[key_added] = model.embed(cells) if split.labels is None else embedding_BD
    record(adata, model, key_added, layer=layer, gene_key=gene_key, labels_key=labels_key, batch_key=batch_key)
    return model


def _start(model_config: Any, encoding: Encoding, seed: int) -> CellTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CellTransformer.for_vocabulary(model_config, encoding.vocabulary)


def _of_encoding(encoding: Encoding) -> dict[str, Any]:
    """Fields of the network's configuration that follow from the encoding."""
    vocabulary, context_length = encoding.vocabulary, encoding.config.context_length
    return {"n_tokens": len(vocabulary), "pad_id": vocabulary.pad_id} | (
        {"context_length": context_length} if context_length else {}
    )


def _sample(rows: NDArray[np.int64], seed: int, keep: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """At most `MOST_CELLS_FOR_SVD` of the rows, drawn at random, and all of `keep`; ascending."""
    if len(rows) > MOST_CELLS_FOR_SVD:
        rows = np.random.default_rng(seed).choice(rows, MOST_CELLS_FOR_SVD, replace=False)
    return np.sort(rows) if keep is None else np.union1d(rows, keep)


def default_config(n_cells: int, seed: int) -> FitConfig:
    """Steps that grow with the square root of the data: 48 for a few hundred cells, 2,000 for a million."""
    return FitConfig(n_steps=int(np.clip(2 * np.sqrt(n_cells), 30, 4000)), seed=seed)


def _fine_tune(
    model: Model,
    cells: CellBatch,
    expression_BV: sparse.csr_matrix,
    split: FitSplit,
    config: FitConfig | None,
    seed: int,
    progress: bool,
) -> None:
    """Fit both voters on the training cells: the transformer, from a linear probe, and the gene classifier."""
    assert split.labels is not None
    network, labels_B = model.network, split.labels.codes[split.train]
    train_cells = cells.select(split.train).replace(labels_B=torch.from_numpy(labels_B))
    model.labels = split.labels.names
    network.add_class_head(len(model.labels))
    rows = _sample(split.fitted, seed, keep=split.train)
    codes_B = np.where(np.isin(rows, split.train), split.labels.codes[rows], -1)
    component_BR = set_gene_classifier(network, expression_BV[rows], codes_B, n_components=N_COMPONENTS, seed=seed)
    features_BE = model.class_features(train_cells)
    set_linear_probe(network, features_BE, labels_B)
    set_vote_weights(network, features_BE, component_BR, labels_B, seed)
    objective = Classification(class_weights_C=class_weights(torch.from_numpy(labels_B), len(model.labels)))
    stage = config or default_config(len(split.train), seed)
    if config is None:
        stage = stage.replace(n_steps=max(15, stage.n_steps // 2))
    stage = stage.replace(learning_rate=FINE_TUNING_SHARE * (stage.learning_rate or 1e-3))
    _run_stage(model, "fine-tuning", objective, train_cells, stage, progress)


def _run_stage(
    model: Model, name: str, objective: Objective, cells: CellBatch, config: FitConfig, progress: bool
) -> None:
    module = train(model.network, objective, cells, config, title=name, progress=progress)
    losses = [float(loss) for loss in module.losses]
    stages = model.history.setdefault("stages", [])
    stages.append({"name": name, "objective": objective.name, "config": module.config.to_dict(), "losses": losses})
