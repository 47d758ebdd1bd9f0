"""`scfm.pretrain`: self-supervised training on files, which may be larger than memory."""

# Axes: B cells, V tokens of the vocabulary.

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from scfm._config import require_seed
from scfm._docs import document
from scfm._files import as_paths
from scfm.data import CellBatch
from scfm.data.files import count_rows
from scfm.encoding import Encoding, EncodingConfig, Vocabulary, read_medians, read_vocabulary
from scfm.families import Preset, choose_preset, load, presets
from scfm.models import CellTransformer, Model
from scfm.models.initialize import GENE_SCALE, N_COMPONENTS, compressed_loadings, set_gene_embeddings
from scfm.objectives import OBJECTIVES, Objective, make_objective
from scfm.train.budget import choose_tokens_per_step
from scfm.train.checkpoints import Resumption
from scfm.train.config import STAGE_DEFAULTS, FitConfig
from scfm.train.loop import train
from scfm.train.module import TrainingModule
from scfm.train.precision import training_device
from scfm.train.ranks import lanes_of, start_process_group
from scfm.train.run import Run
from scfm.train.statistics import Data, Statistics, learn
from scfm.train.stream import CellStream
from scfm.train.writing import write_run

MAX_VALIDATION_CELLS = 1000
LEARNING_RATE, EMBEDDING_SCALE = 3e-4, 0.1  # at 1e-3, embeddings of PBMC 3k got worse; not settled on other studies


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
    paths
        Paths of `.h5ad` files and `.zarr` folders with raw counts, or one path. If some files name genes by symbols and others
        by Ensembl ids, `var` of a file must hold both kinds of names, to translate them.
    out
        Folder to write: `model/`, `config.json`, `losses.csv`, `losses.png`, `README.md` (the model card), `checkpoints/`.
    init
        Initial weights. "svd": gene embeddings are the leading right singular vectors of log-normalized expression, so genes
        that are expressed in the same cells have similar embeddings; other weights are random. None: all weights are random.
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
        the other genes of the cell (only with bin, as scGPT). None for the objective of the preset, or of `init`.
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
    data = Data(paths=as_paths(paths), layer=layer, gene_key=gene_key, depth_key=depth_key)
    if not data.paths:
        raise ValueError("`paths` is empty; name at least one .h5ad file or .zarr folder.")
    if init is not None and init != "svd" and not isinstance(init, Model):
        init = load(init)
    start = _start(init, preset, encoding, objective, vocabulary, medians)
    if depth_key is not None:
        start = replace(start, encoding=start.encoding.replace(depth_key=depth_key))
    n_obs = sum(map(count_rows, data.paths))
    usual = {**start.stage_defaults, "n_steps": FitConfig.for_cells(n_obs).n_steps, "seed": seed}
    config = (config or FitConfig()).with_defaults(**usual)
    start_process_group(config, training_device(config))
    held_out = _HeldOut.choose(validation, data, n_obs, seed)
    with Run.open(Path(out), config) as run:
        fingerprint = data.fingerprint()
        settings = {
            **start.to_dict(),
            "validation": held_out.to_dict(),
            **{name: getattr(data, name) for name in ("layer", "gene_key", "depth_key")},
            "seed": seed,
        }
        statistics = run.statistics(
            {**settings, "data": fingerprint["sha256"]}, lambda: start.learn(data, held_out.of_training, seed)
        )
        network, training_encoding = start.network(statistics, seed), statistics.encoding(start.training_encoding)
        task = make_objective(start.objective, network, training_encoding)
        valid = held_out.cells(data, training_encoding)
        sample = valid if valid is not None else _first_cells(data, training_encoding, statistics)
        config = _with_token_budget(config, run, network, task, sample)
        if (resumed := Resumption.newest(run.folder)) is not None:
            config = resumed.divided(config)
        settings["config"] = config.to_dict()
        run.resume_or_start(settings, fingerprint)
        streams = _streams(data, training_encoding, statistics, config)
        module = _train(network, task, streams, config, run, valid, progress)
        encoding_after = statistics.encoding(start.encoding)
        history = _history(start.base, module, settings, fingerprint)
        model = Model(network, encoding_after, objective=start.objective, history=history)
        if run.is_first:
            write_run(run.folder, model, module, settings, fingerprint)
    return model


@dataclass(frozen=True, kw_only=True, eq=False)
class _Start:
    """The start of a run: a preset, or the network of a model."""

    encoding: EncodingConfig
    objective: str
    preset: Preset | None = None
    base: Model | None = None
    init: str | None = None
    vocabulary: Vocabulary | None = None
    medians: NDArray[np.float64] | None = None

    @property
    def training_encoding(self) -> EncodingConfig:
        return self.encoding.replace(**OBJECTIVES[self.objective].encoding_settings)

    @property
    def stage_defaults(self) -> dict[str, Any]:
        """Return default settings of training; initialized gene embeddings get a lower learning rate."""
        scale = 1.0 if self.init is None else EMBEDDING_SCALE
        return {**STAGE_DEFAULTS, "learning_rate": LEARNING_RATE, "embedding_learning_rate_scale": scale}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that identify this start, as JSON values."""
        medians = None if self.medians is None else hashlib.sha256(self.medians.tobytes()).hexdigest()
        return {
            "preset": None if self.preset is None else self.preset.name,
            "encoding": self.encoding.to_dict(),
            "objective": self.objective,
            "init": self.init,
            "vocabulary": None if self.vocabulary is None else self.vocabulary.fingerprint,
            "medians": medians,
        }

    def learn(self, data: Data, held_out_B: NDArray[np.bool_], seed: int) -> Statistics:
        return learn(
            data,
            self.training_encoding,
            held_out_B=held_out_B,
            vocabulary=self.vocabulary,
            medians=self.medians,
            n_components=N_COMPONENTS if self.init == "svd" else 0,
            seed=seed,
        )

    def network(self, statistics: Statistics, seed: int) -> CellTransformer:
        """Return the initial network."""
        vocabulary = statistics.vocabulary
        if self.base is not None:
            network = copy.deepcopy(self.base.network)
            network.remove_class_head()
            return network
        assert self.preset is not None
        # scBERT's gene embedding is frozen, because it is from gene2vec; here it is initialized differently, so it is trained.
        config = self.preset.model_config(
            n_tokens=len(vocabulary), pad_id=vocabulary.pad_id, embedding={"train_genes": True}
        )
        if self.encoding.context_length is not None:
            config = config.replace(context_length=self.encoding.context_length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = CellTransformer.for_vocabulary(config, vocabulary)
        if statistics.loadings_VR.shape[1]:
            set_gene_embeddings(network, compressed_loadings(statistics.loadings_VR), scale=GENE_SCALE)
        return network


def _start(
    init: Model | str | None,
    preset: str | None,
    encoding: str | EncodingConfig | None,
    objective: str | None,
    vocabulary: Vocabulary | str | Path | None,
    medians: ArrayLike | str | Path | None,
) -> _Start:
    if isinstance(init, Model):
        return _continued(init, objective, preset=preset, encoding=encoding, vocabulary=vocabulary, medians=medians)
    kind = encoding.kind if isinstance(encoding, EncodingConfig) else encoding
    chosen = choose_preset(preset or "small", encoding=kind, objective=objective)
    if vocabulary is not None and not isinstance(vocabulary, Vocabulary):
        vocabulary = read_vocabulary(vocabulary)
    if medians is not None and vocabulary is None:
        raise ValueError("`medians` are indexed by token id. Pass the `vocabulary` that they belong to.")
    if isinstance(medians, str | Path):
        assert vocabulary is not None
        medians = read_medians(medians, vocabulary)
    return _Start(
        preset=chosen,
        encoding=encoding if isinstance(encoding, EncodingConfig) else EncodingConfig(**chosen.encoding),
        objective=chosen.objective,
        init=init,
        vocabulary=vocabulary,
        medians=None if medians is None else np.asarray(medians, dtype=np.float64),
    )


def _continued(base: Model, objective: str | None, **given: Any) -> _Start:
    """Return a start from a model, which is not changed."""
    if names := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"`init` is a model, whose {' and '.join(names)} cannot be changed. Omit `{names[0]}`.")
    chosen = base.objective
    if objective is not None or chosen is None:
        kind = base.encoding.config.kind
        able = [preset for preset in presets() if preset.encoding["kind"] == kind]
        chosen = able[0].for_objective(objective or "masked").objective
    return _Start(
        base=base,
        encoding=base.encoding.config,
        objective=chosen,
        init=f"model {base.id}",
        vocabulary=base.encoding.vocabulary,
        medians=base.encoding.medians,
    )


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """The validation cells: rows of the training files or of other files."""

    paths: tuple[Path, ...]  # other files
    of_training: NDArray[np.bool_]
    fraction: float | None
    rows: NDArray[np.bool_]  # of the files that they are taken from

    @classmethod
    def choose(
        cls, validation: float | str | Path | Sequence[str | Path] | None, data: Data, n_obs: int, seed: int
    ) -> _HeldOut:
        none = np.zeros(n_obs, dtype=bool)
        rng = np.random.default_rng(seed)
        if validation is None:
            return cls((), none, None, none)
        if isinstance(validation, int | float):
            if not 0 < validation < 1:
                raise ValueError(f"`validation` is {validation}; a fraction of the cells must be between 0 and 1.")
            n_cells = min(MAX_VALIDATION_CELLS, max(1, round(validation * n_obs)), n_obs - 1)
            chosen = _drawn(n_obs, n_cells, rng)
            return cls((), chosen, float(validation), chosen)
        paths = as_paths(validation)
        if twice := sorted({path.name for path in paths if path.resolve() in {each.resolve() for each in data.paths}}):
            raise ValueError(f"{', '.join(twice)} is in `paths` and in `validation`. Remove it from one of them.")
        n_cells = sum(map(count_rows, paths))
        return cls(paths, none, None, _drawn(n_cells, min(MAX_VALIDATION_CELLS, n_cells), rng))

    def to_dict(self) -> float | list[str] | None:
        return [path.name for path in self.paths] if self.paths else self.fraction

    def cells(self, data: Data, encoding: Encoding) -> CellBatch | None:
        """Return the encoded cells; None if there are none."""
        if not self.rows.any():
            return None
        return _encoded(self.paths or data.paths, data, encoding, self.rows)


def _drawn(n_cells: int, n_drawn: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    drawn = np.zeros(n_cells, dtype=bool)
    drawn[rng.permutation(n_cells)[:n_drawn]] = True
    return drawn


def _encoded(paths: Sequence[Path], data: Data, encoding: Encoding, rows: NDArray[np.bool_]) -> CellBatch:
    """Encode some rows of files; cells without a gene of the vocabulary are omitted."""
    stream = CellStream(
        paths,
        encoding,
        batch_cells=1024,
        lengths_B=rows.astype(int),
        shuffle=False,
        layer=data.layer,
        gene_key=data.gene_key,
        depth_key=data.depth_key,
    )
    cells = CellBatch.concat(list(stream))
    return cells.select(torch.nonzero(cells.lengths_B > encoding.config.n_special_tokens).squeeze(1))


def _first_cells(data: Data, encoding: Encoding, statistics: Statistics) -> CellBatch:
    """Return some cells of all files, to measure the memory per token."""
    rows = np.zeros(len(statistics.lengths_B), dtype=bool)
    rows[np.linspace(0, len(rows) - 1, 256).astype(int)] = True
    return _encoded(data.paths, data, encoding, rows)


def _streams(data: Data, encoding: Encoding, statistics: Statistics, config: FitConfig) -> list[CellStream]:
    """Return one stream for each batch that this process contributes to a step."""
    lanes, n_lanes = lanes_of(config)
    assert config.seed is not None
    return [
        CellStream(
            data.paths,
            encoding,
            max_tokens=config.tokens_per_step,
            lengths_B=statistics.lengths_B,
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
    config: FitConfig, run: Run, network: CellTransformer, objective: Objective, cells: CellBatch
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
    streams: list[CellStream],
    config: FitConfig,
    run: Run,
    validation: CellBatch | None,
    progress: bool,
) -> TrainingModule:
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
