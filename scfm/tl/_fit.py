"""`scfm.fit`: train a model on counts in one call."""

# Axes: B cells, X inputs of the class head.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
from numpy.typing import NDArray

from scfm import pp
from scfm._config import require_seed
from scfm._docs import document
from scfm.annotation.finetune import Cells, finetune, inference_precision, score_from_scratch, short_stage, stage_config
from scfm.annotation.scores import score_baselines, score_model, score_probe
from scfm.annotation.splits import split_for_fit
from scfm.data.many_files import open_data
from scfm.encoding import EncodingConfig
from scfm.errors import ModelTaskError
from scfm.families import choose_preset
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.objectives import OBJECTIVES, make_objective
from scfm.pp._encode import require_cells
from scfm.tl._fit_start import FitCounts, copied_model, encoding_settings, new_model
from scfm.tl._record import record
from scfm.train import FitConfig, run_stage

MAX_CELLS_TO_SCORE = 20_000  # of the test cells, for all rows of the report


@document
def fit(
    adata: anndata.AnnData | str | Path | Sequence[str | Path],
    *,
    labels_key: str | None = None,
    model: Model | str | Path | None = None,
    batch_key: str | None = None,
    test_key: str | None = None,
    transductive: bool = False,
    encoding: str | EncodingConfig | None = None,
    context_length: int | None = None,
    objective: str | None = None,
    pretrain: bool | None = None,
    preset: str | None = None,
    extend_vocabulary: bool = False,
    compare_from_scratch: bool = False,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    test_fraction: float = 0.2,
    baselines: bool = True,
    seed: int = 0,
    config: FitConfig | None = None,
    pretrain_config: FitConfig | None = None,
    key_added: str = "X_scfm",
    progress: bool = True,
) -> Model:
    """Train a model on raw counts. With `labels_key`, it is also trained to predict these labels.

    Without `model`, a new network is first trained on the cells without their labels (pretraining). With `model`, a copy of
    a pretrained model is trained further, with the same encoding, vocabulary and medians; the given model is not changed.

    With labels, a part of the labeled cells (the test cells) is held out from everything that is fitted: vocabulary,
    medians, pretraining and classifiers. `model.report()` compares the model with simple baselines on these cells. A tenth
    of the other labeled cells (the calibration cells) is used to calibrate an ensemble that predicts the labels. Its members
    are the fine-tuned transformer, a logistic regression on principal components of expression, which are computed from
    labeled and unlabeled cells, a logistic regression on the expression of all genes, and a linear discriminant analysis of
    the components. Then the linear members are fitted again on training and calibration cells together. They learn from at
    most 20,000 cells of each part, the training cells among them with as equal numbers per class as possible.

    Parameters
    ----------
    {adata_or_files}
        Memory holds the tokens of all cells (4 bytes each, twice that with values) and the counts of some 10,000 cells. Nothing
        is written to files or to an AnnCollection; `scfm.tl.embed_files` embeds the cells of files.
    labels_key
        Column of `adata.obs` with cell types. Cells without a label (NaN) are used too, except to learn the labels;
        `scfm.tl.annotate` predicts their labels.
    model
        Pretrained model to start from: a `Model`, the path of a saved model or of a published checkpoint, or the name of
        a repository on the Hugging Face Hub. None for a new model.
    batch_key
        Column of `adata.obs` with donors or batches. The test cells are then all cells of some of them, and their fraction is
        only approximately `test_fraction`. Used with `labels_key` and without `test_key`.
    test_key
        Boolean column of `adata.obs` that is True for the test cells. None for a random part of the labeled cells.
    transductive
        Whether test and calibration cells are also used, without their labels, for all that is learned without labels
        (vocabulary, medians, pretraining, principal components). The scores are then valid for these cells only, not for new
        cells, and the report marks them as "transductive".
    encoding
        "rank": genes in descending order of their expression relative to their median expression (Geneformer). "bin":
        genes with binned values (scGPT). Or an :class:`scfm.EncodingConfig` of either kind. None for "rank". Not with
        `model`, whose encoding is kept.
    context_length
        Maximum number of tokens of a cell; genes beyond it are left out, and cannot be deleted in silico. None: the value in
        `encoding`, if it has one; 128 with `labels_key` and a rank encoding (more genes do not change the predicted labels in
        our benchmarks); otherwise the value of the preset, 1,024 for the sizes. Not with `model`.
    objective
        "masked": predict hidden genes (rank) or hidden values (bin). "generative": predict the values of random target genes
        from the other genes of the cell (only with bin, as scGPT). "profile": predict a part of the counts of a cell from
        the embedding of the other part (only sizes with rank). None for "masked". Not with `model`, whose objective is kept.
    pretrain
        Whether to train without labels first. With `model`, this continues its pretraining on the new cells, with its
        objective. None for True, except with both `model` and `labels_key`, where the model is only fine-tuned.
    preset
        Size of a new network: "small" (the default), "medium" or "large"; or the name of a preset in
        `scfm.families.table()`, which is trained from scratch with its encoding. Not with `model`.
    extend_vocabulary
        Whether to add genes of the data that are not in the vocabulary of `model`. The initial embedding of a new gene is
        predicted from its loadings on principal components of the data, by a ridge regression that is fitted on the genes of
        the vocabulary. By default these genes are ignored, and their number is logged.
    compare_from_scratch
        Whether to fine-tune also a network of the same architecture with random initial weights, for the same number of
        steps. The report then has a row for it.
    {layer}
    {gene_key}
    {depth_key}
    test_fraction
        Fraction of the labeled cells that are test cells. Classes with a single cell have no test cell.
    baselines
        Whether to fit the simple methods of the report, on up to 20,000 cells. The report is about at most 20,000 test cells.
    seed
        Seed of the split and the initialization; also of the order of cells, masks and dropout, unless `config` has a
        seed. The same seed gives the same model on one machine.
    config
        With labels, settings of fine-tuning; without labels, settings of pretraining. Settings that are None are chosen by the
        numbers of cells and parameters. `config.trainable` determines which weights are fine-tuned.
    pretrain_config
        With labels, settings of pretraining. None to choose them by the number of cells; devices and precision are then
        those of `config`.
    {obsm_key_added}
    progress
        Whether to show a progress bar with loss, cells per second and remaining time.

    Returns
    -------
    The model. If `adata` is an AnnData, the function also writes the embedding to `obsm[key_added]`, shape (n_obs, width of the embedding), float32;
    with labels, the part of each cell ("train", "calibration", "test" or "unlabeled") to `obs["scfm_split"]`; and the id of
    the model with all settings to `uns["scfm"]`.

    Raises
    ------
    CountsError
        If the matrix does not hold raw counts; the message says where they may be.
    LabelsError
        If `labels_key` does not exist (in one of the files), or there are too few classes or cells.
    EmptyCellError
        If a cell expresses no gene of the vocabulary.
    VocabularyMismatchError
        If the genes of the data do not match `model`.
    ModelFileError
        If `model` is a path or a name that cannot be opened.
    ModelTaskError
        If `model` is to be pretrained but its pretraining objective is unknown, or genes are to be added to a vocabulary that
        is fixed.
    ValueError
        If `preset`, `encoding` or `objective` is unknown, `test_fraction` is not between 0 and 1, or arguments contradict
        each other; the message says which.
    TypeError
        If `adata` is neither an AnnData nor the names of files.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> short = scfm.FitConfig(n_steps=2)
    >>> pretrained = scfm.fit(adata, config=short, progress=False)
    >>> adata.obsm["X_scfm"].shape
    (700, 128)
    >>> annotator = scfm.fit(
    ...     adata, labels_key="bulk_labels", model=pretrained, config=short.replace(trainable="lora:4"), progress=False
    ... )
    >>> "linear probe on the frozen embedding" in annotator.report().index
    True
    """
    require_seed(seed)
    data = open_data(adata)
    require_cells(data)
    if pretrain is None:
        pretrain = model is None or labels_key is None
    _refuse_unused(
        has_labels=labels_key is not None,
        has_model=model is not None,
        pretrain=pretrain,
        config=config,
        pretrain_config=pretrain_config,
    )
    split = split_for_fit(
        data.obs,
        labels_key=labels_key,
        batch_key=batch_key,
        test_key=test_key,
        test_fraction=test_fraction,
        transductive=transductive,
        seed=seed,
    )
    counts = FitCounts(data, layer, gene_key, depth_key)
    if model is None:
        kind = encoding.kind if isinstance(encoding, EncodingConfig) else encoding
        chosen = choose_preset(preset or "small", encoding=kind, objective=objective)
        settings = encoding_settings(chosen, encoding, context_length, annotates=labels_key is not None)
        fitted, cells = new_model(counts, chosen, settings, split=split, seed=seed)
    else:
        _refuse_with_model(encoding=encoding, preset=preset, objective=objective, context_length=context_length)
        fitted, cells = copied_model(counts, opened(model), split, seed, extend_vocabulary=extend_vocabulary)
    if pretrain:
        stage = config or FitConfig()
        if labels_key is not None:
            stage = pretrain_config or stage.machine_only()
            if model is None:
                stage = stage.with_defaults(**short_stage("pretraining", len(split.fitted), cells.tokens))
        _pretrain(fitted, counts, cells, stage.with_defaults(seed=seed), progress)
    features_BX = None
    if labels_key is not None:
        stage = stage_config(config, fitted.network, cells, seed)
        rows = {"probe": model is not None, "from_scratch": compare_from_scratch, "baselines": baselines}
        features_BX = _finetune(fitted, counts, cells, stage, rows=rows, seed=seed, progress=progress)
    if isinstance(data, anndata.AnnData):
        if features_BX is None:
            data.obsm[key_added] = fitted.embed(cells.tokens, progress=progress)
        else:
            data.obs["scfm_split"] = split.names(data.n_obs)
            data.obsm[key_added] = fitted.embedding_of_features(features_BX, cells.tokens)
        record(data, fitted, key_added, **counts.source, labels_key=labels_key, batch_key=batch_key)
    return fitted


def _finetune(
    model: Model,
    counts: FitCounts,
    cells: Cells,
    config: FitConfig,
    *,
    rows: dict[str, bool],
    seed: int,
    progress: bool,
) -> NDArray[np.float32]:
    """Fine-tune the model, give it its scores and the rows of other methods, and return the class features of all cells."""
    scored = cells.split.limited(MAX_CELLS_TO_SCORE, seed)
    frozen_BX = model.class_features(cells.tokens, precision=inference_precision(config)) if rows["probe"] else None
    outputs = finetune(model, cells, config, seed=seed, progress=progress)
    model.scores = score_model(model, outputs.logits_BC, cells.expression(scored.test), scored)
    if frozen_BX is not None:
        model.scores.append(score_probe(frozen_BX, scored, seed=seed))
    if rows["from_scratch"]:
        scratch = replace(cells, split=replace(cells.split, test=scored.test))
        model.scores.append(score_from_scratch(model, scratch, config, progress=progress))
    if rows["baselines"]:
        model.scores += score_baselines(counts.expression, scored, n_obs=len(cells.tokens), seed=seed)
    return outputs.features_BX


def _pretrain(model: Model, counts: FitCounts, cells: Cells, config: FitConfig, progress: bool) -> None:
    if model.objective is None:
        raise ModelTaskError(
            "The pretraining objective of this model is unknown, so pretraining cannot be continued. "
            "Fine-tune it with `labels_key`, without `pretrain`, or continue with `scfm.pretrain(files, out, init=model)`."
        )
    objective, tokens = make_objective(model.objective, model.network, model.encoding), cells.tokens
    settings = OBJECTIVES[model.objective].encoding_settings
    if settings.get("keep_counts"):
        tokens = pp.encode(counts.adata, model.encoding.replace(**settings), **counts.source)
    tokens = tokens.select(cells.split.fitted)
    defaults = {"n_steps": FitConfig.for_cells(len(tokens)).n_steps, **OBJECTIVES[model.objective].training_settings}
    config = config.with_defaults(**defaults)
    run_stage(model, "pretraining", objective=objective, cells=tokens, config=config, progress=progress)


def _refuse_unused(
    *, has_labels: bool, has_model: bool, pretrain: bool, config: FitConfig | None, pretrain_config: FitConfig | None
) -> None:
    """Raise `ValueError` if settings are given for a stage that does not take place, or a given model is not trained."""
    if not has_labels and not pretrain and (has_model or config is not None):
        raise ValueError(
            "`pretrain` is False and `labels_key` is None, so nothing would be trained. Pass `labels_key` to fine-tune, or "
            "omit `pretrain` to train without labels. `scfm.tl.embed` embeds cells without training."
        )
    if pretrain_config is not None and not (has_labels and pretrain):
        reason = "the fit does not pretrain" if has_labels else "without labels, `config` holds the settings of the fit"
        raise ValueError(
            f"`pretrain_config` is given, but {reason}. Omit it{'' if has_labels else ', or pass it as `config`'}."
        )


def _refuse_with_model(**options: object) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(
            f"`{given[0]}` is for a new model, but `model` is given, whose settings are kept. Omit `{given[0]}`, or omit "
            "`model` to train a new one."
        )
