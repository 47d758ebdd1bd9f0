"""`scfm.pretrain`: self-supervised training on files, which may be larger than memory."""

# Axes: B cells, V tokens of the vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from scfm._config import require_seed
from scfm._docs import document
from scfm._remote import input_paths
from scfm.data import CellBatch
from scfm.data.files import count_rows
from scfm.encoding import Encoding, EncodingConfig, Vocabulary
from scfm.families import load
from scfm.models import CellTransformer, Model
from scfm.objectives import Objective, make_objective
from scfm.train.budget import choose_tokens_per_step
from scfm.train.checkpoints import Resumption
from scfm.train.config import FitConfig
from scfm.train.held_out import HeldOut, encode_rows
from scfm.train.precision import training_device
from scfm.train.ranks import lanes_of, start_process_group
from scfm.train.run import Run
from scfm.train.sampling import Sampling, make_sampling
from scfm.train.start import choose_start
from scfm.train.statistics import Data, Statistics
from scfm.train.stream import CellStream
from scfm.train.writing import write_run

if TYPE_CHECKING:
    from scfm.train.module import TrainingModule


@document
def pretrain(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    init: str | Path | Model | None = "svd",
    preset: str | None = None,
    encoding: str | EncodingConfig | None = None,
    objective: str | None = None,
    vocabulary: Vocabulary | str | Path | None = None,
    medians: ArrayLike | str | Path | None = None,
    validation: float | str | Path | Sequence[str | Path] | None = None,
    sampling: str | Sampling = "shuffled",
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    config: FitConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Pretrain a model on raw counts in files, of which only a part is in memory at a time.

    An unfinished run in `out` with the same settings and data is resumed from its newest readable checkpoint. The number of
    devices, the number of steps and the interval of checkpoints may differ. Under torchrun, each process reads a part of the
    data, and the first one writes the results. After Ctrl-C or SIGTERM, a checkpoint is written at the end of the current
    step.

    Parameters
    ----------
    {paths}
        If some files name genes by symbols and others by Ensembl ids, `var` of a file must hold both kinds of names, to
        translate them.
    out
        Folder to write: `model/`, `config.json`, `losses.csv`, `losses.png`, `README.md` (the model card), `checkpoints/`.
    init
        Initial weights. "svd": gene embeddings are the leading right singular vectors of log-normalized expression, so genes
        that are expressed in the same cells have similar embeddings; other weights are random. For the objective "profile",
        they are loadings of Pearson residuals, and the blocks add nothing at first. None: all weights are random.
        A model, or its path (any other string): its pretraining continues on the new files, with its encoding and vocabulary.
    preset
        Size of the network ("small", "medium" or "large"), or the name of a published architecture, such as
        "geneformer-v1-10m" or "scgpt-human", which is trained from scratch with its encoding; `scfm.families.table()` lists
        them. None for "small". Not with a model as `init`.
    encoding
        "rank" or "bin", if `preset` is a size; published architectures have a fixed encoding. Or an
        :class:`scfm.EncodingConfig`. None: "rank", or the encoding of the preset. Not with a model as `init`.
    objective
        "masked": predict hidden genes (rank) or hidden values. "generative": predict the values of random target genes from
        the other genes of the cell (only with bin, as scGPT). "profile": predict a part of the counts of a cell from the
        embedding of the other part (only sizes with rank). None for the objective of the preset, or of `init`.
    vocabulary
        A `Vocabulary`, or a file with one: a published dictionary or a file of scfm. None for all genes with a count in at
        least one file. Not with a model as `init`.
    medians
        For rank encodings: medians by token id, or a file of published medians; `vocabulary` is then required. None to learn
        them from the files.
    validation
        Validation cells: a fraction of the cells, which is held out (at most 1,000 cells), or files that are not in `paths`,
        from which up to 1,000 cells are read. The loss of these cells is computed every `config.validate_every` steps, and
        the weights with the lowest validation loss are kept. None for no validation.
    sampling
        How often each cell is read in an epoch. "shuffled": once. "balanced:COLUMN": all classes of a column of `obs` equally
        often. "weighted:COLUMN": in proportion to the weights in a column of `obs`. "by-file": all files equally often. Or an
        object of `scfm.train.sampling`, which has more settings, such as weights of files. An epoch has as many cells in all
        cases, and a cell is read at most ten times in it.
    {layer}
    {gene_key}
    {depth_key}
    config
        Settings of training. The number of steps is by default that of `scfm.FitConfig.for_cells`.
    seed
        Seed of the initialization and the choice of validation cells; also of training, unless `config` has a seed.
    progress
        Whether to show a progress bar.

    Returns
    -------
    The model, which is also saved in the folder `model` of `out`.

    Raises
    ------
    CountsError
        If a file does not hold raw counts.
    VocabularyMismatchError
        If the genes of the files do not match each other, the vocabulary or the model.
    ModelFileError
        If `init`, `vocabulary` or `medians` cannot be read.
    LabelsError
        If a column of `sampling` is missing in a file, or does not hold weights or classes for all cells.
    ValueError
        If `out` holds a run with other settings or data, `paths` is empty, `validation` is not between 0 and 1 or names a file
        of `paths`, or arguments contradict each other; the message says which.
    OSError
        If a file is missing or cut short, or `out` cannot be written.

    Notes
    -----
    The singular vectors are computed from at most 20,000 cells, which are read in blocks.

    Examples
    --------
    >>> import scfm
    >>> scfm.datasets.pbmc()[:100].write_h5ad("cells.h5ad")
    >>> config = scfm.FitConfig(n_steps=2, tokens_per_step=512)
    >>> model = scfm.pretrain(["cells.h5ad"], "run", validation=0.1, config=config, progress=False)
    >>> scfm.load("run/model").id == model.id
    True
    """
    require_seed(seed)
    sampling = make_sampling(sampling)
    data = Data(paths=input_paths(paths), layer=layer, gene_key=gene_key, depth_key=depth_key)
    if not data.paths:
        raise ValueError("`paths` is empty; name at least one .h5ad file or .zarr folder.")
    if init is not None and init != "svd" and not isinstance(init, Model):
        init = load(init)
    start = choose_start(
        init, preset=preset, encoding=encoding, objective=objective, vocabulary=vocabulary, medians=medians
    )
    if depth_key is not None:
        start = replace(start, encoding=start.encoding.replace(depth_key=depth_key))
    n_obs = sum(map(count_rows, data.paths))
    usual = {**start.stage_defaults, "n_steps": FitConfig.for_cells(n_obs).n_steps, "seed": seed}
    config = (config or FitConfig()).with_defaults(**usual)
    start_process_group(config, training_device(config))
    held_out = HeldOut.choose(validation, data, n_obs, seed)
    with Run.open(Path(out), config) as run:
        fingerprint = data.fingerprint()
        settings = {
            **start.to_dict(),
            "validation": held_out.to_dict(),
            **{name: getattr(data, name) for name in ("layer", "gene_key", "depth_key")},
            "seed": seed,
        }
        statistics = run.statistics(
            {**settings, "data": fingerprint["sha256"]}, start.learning(data, held_out.of_training, seed)
        )
        network, training_encoding = start.network(statistics, seed), statistics.encoding(start.training_encoding)
        task = make_objective(start.objective, network, training_encoding)
        valid = held_out.cells(data, training_encoding)
        sample = valid if valid is not None else _first_cells(data, training_encoding, statistics)
        config = _with_token_budget(config, run, network=network, objective=task, cells=sample)
        if (resumed := Resumption.newest(run.folder)) is not None:
            config = resumed.divided(config)
        settings |= {"config": config.to_dict(), "sampling": sampling.to_dict()}
        run.resume_or_start(settings, fingerprint)
        streams = _streams(data, training_encoding, statistics, sampling, config)
        module = _train(network, task, streams=streams, config=config, run=run, validation=valid, progress=progress)
        encoding_after = statistics.encoding(start.encoding)
        history = _history(start.base, module, settings, fingerprint)
        model = Model(network, encoding_after, objective=start.objective, history=history)
        if run.is_first:
            write_run(run.folder, model, module=module, settings=settings, fingerprint=fingerprint)
    return model


def _first_cells(data: Data, encoding: Encoding, statistics: Statistics) -> CellBatch:
    """Return some cells of all files, to measure the memory per token."""
    rows = np.zeros(len(statistics.lengths_B), dtype=bool)
    rows[np.linspace(0, len(rows) - 1, 256).astype(int)] = True
    return encode_rows(data.paths, data, encoding, rows)


def _streams(
    data: Data, encoding: Encoding, statistics: Statistics, sampling: Sampling, config: FitConfig
) -> list[CellStream]:
    """Return one stream for each batch that this process contributes to a step."""
    lanes, n_lanes = lanes_of(config)
    assert config.seed is not None
    return [
        CellStream(
            data.paths,
            encoding,
            max_tokens=config.tokens_per_step,
            lengths_B=statistics.lengths_B,
            sampling=sampling,
            seed=config.seed,
            rank=lane,
            world_size=n_lanes,
            layer=data.layer,
            gene_key=data.gene_key,
            depth_key=data.depth_key,
        )
        for lane in lanes
    ]


def _with_token_budget(
    config: FitConfig, run: Run, *, network: CellTransformer, objective: Objective, cells: CellBatch
) -> FitConfig:
    """Set the token budget: that of the run in the folder, or a measured one."""
    if config.tokens_per_step is not None:
        return config
    stored = run.stored()
    if stored is not None:
        tokens = stored["pretrain"]["config"]["tokens_per_step"]
    else:
        tokens = choose_tokens_per_step(network, objective, cells, config, device=training_device(config))
    return config.replace(tokens_per_step=tokens)


def _train(
    network: CellTransformer,
    objective: Objective,
    *,
    streams: list[CellStream],
    config: FitConfig,
    run: Run,
    validation: CellBatch | None,
    progress: bool,
) -> TrainingModule:
    from scfm.train.loop import train  # Lightning takes seconds to import

    try:
        return train(
            network,
            objective,
            streams,
            config,
            title="pretraining",
            validation=validation,
            run_dir=run.folder,
            progress=progress,
        )
    except (KeyboardInterrupt, SystemExit) as stop:
        if any((run.folder / "checkpoints").glob("*.ckpt")):
            stop.add_note(f"Checkpoints are in {run.folder / 'checkpoints'}; the same call resumes from the newest.")
        raise
    finally:
        for stream in streams:
            stream.close()


def _history(
    base: Model | None, module: TrainingModule, settings: dict[str, Any], fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """Return the history of the model, with this stage added."""
    stage = {
        "name": "pretraining",
        "objective": module.objective.name,
        "config": settings,
        "losses": [float(loss) for loss in module.losses],
        "validation_losses": [[step, loss] for step, loss in module.validation_losses],
    }
    before = [] if base is None else base.history.get("stages", [])
    return {"stages": [*before, stage], "data": fingerprint}
