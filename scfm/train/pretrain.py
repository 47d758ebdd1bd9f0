"""`pretrain`: self-supervised training over any number of files, larger than memory."""

# Axes: B cells, V tokens of the vocabulary.

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm._files import require_folder
from scfm.data import CellBatch, CountSource
from scfm.data.files import count_rows
from scfm.encoding import Encoding, EncodingConfig, GeneMap, Vocabulary, build_vocabulary
from scfm.encoding.registry import ENCODINGS
from scfm.families import Preset, choose_preset
from scfm.models import CellTransformer, Model
from scfm.objectives import OBJECTIVES, Objective, make_objective
from scfm.train.budget import choose_tokens_per_step, training_device
from scfm.train.config import FitConfig
from scfm.train.loop import train
from scfm.train.ranks import rank_and_world_size
from scfm.train.stream import CellStream
from scfm.train.writing import write_run

MOST_CELLS_TO_LEARN_FROM = 50_000  # of medians: twelve bytes a non-zero count
CHUNK_CELLS = 512  # neighbouring cells that are read together for it


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What is pretrained, and how; the fields of the config file of `scfm pretrain`.

    Attributes
    ----------
    preset
        Size of the network ("small", "medium" or "large"), or the shape and encoding of a published one, trained from
        scratch: "geneformer-v1-10m", "scgpt-human" and others that `scfm.families.table()` lists.
    encoding
        "rank" or "bin" for one of our sizes (None: rank); a published preset has its own.
    objective
        "masked": guess hidden genes (rank) or hidden values. "generative": from known genes the values of all others
        (bin; scGPT). None: the preset's own.
    layer, gene_key, depth_key
        Where the files keep counts, gene names and total counts; the same for all.
    fit
        Settings of training.

    Examples
    --------
    >>> import scfm
    >>> config = scfm.train.PretrainConfig(preset="small", objective="generative", encoding="bin")
    >>> scfm.train.PretrainConfig.from_dict(config.to_dict()) == config
    True
    """

    preset: str = "small"
    encoding: str | None = None
    objective: str | None = None
    layer: str | None = None
    gene_key: str | None = None
    depth_key: str | None = None
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        chosen = self.chosen_preset  # refuses what does not go together
        object.__setattr__(self, "encoding", chosen.encoding["kind"])
        object.__setattr__(self, "objective", "generative" if chosen.objective == "generative" else "masked")

    @property
    def chosen_preset(self) -> Preset:
        return choose_preset(self.preset, encoding=self.encoding, objective=self.objective)

    @property
    def tokens_per_step(self) -> int:
        assert self.fit.tokens_per_step is not None  # filled in before it is asked for
        return self.fit.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "fit": self.fit.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainConfig:
        """Build from a config file, also one that a run wrote; an unknown field is an error."""
        values = values.get("pretrain", values)
        if unknown := sorted(set(values) - set(cls.__dataclass_fields__)):
            raise ValueError(
                f"The config has no field {', '.join(unknown)}; it has {', '.join(cls.__dataclass_fields__)}."
            )
        return cls(**{**values, "fit": FitConfig.from_dict(values.get("fit", {}))})


def pretrain(
    paths: Sequence[str | Path], out: str | Path, config: PretrainConfig | None = None, *, progress: bool = True
) -> Model:
    """Pretrain a model on raw counts in files; the files are streamed, never loaded whole.

    Started again with the same `out`, it goes on from the newest readable checkpoint. Under torchrun every process
    takes its part of the data, and the first one writes.

    Parameters
    ----------
    paths
        `.h5ad` files and `.zarr` folders with raw counts. The vocabulary is made of the genes that any of them expresses.
    out
        Folder to write: `model/`, `config.json`, `losses.csv`, `losses.png`, `README.md` (the model card), `checkpoints/`.
    config
        All settings; None for the defaults.
    progress
        Whether to show a progress bar.

    Raises
    ------
    CountsError
        If a file holds no raw counts.
    ValueError
        If `out` holds a run with other settings or data.

    Examples
    --------
    >>> import scfm
    >>> scfm.datasets.pbmc()[:100].write_h5ad("cells.h5ad")
    >>> config = scfm.train.PretrainConfig(fit=scfm.FitConfig(n_steps=2, tokens_per_step=512))
    >>> model = scfm.train.pretrain(["cells.h5ad"], "run", config, progress=False)
    >>> scfm.load("run/model").id == model.id
    True
    """
    files, out, config = [Path(path) for path in paths], Path(out), config or PretrainConfig()
    require_folder(out)
    rank, world_size = rank_and_world_size(config.fit)
    fingerprint = data_fingerprint(files)
    encoding = learn_encoding(files, config)
    network = _network(encoding, config)
    objective = make_objective(config.chosen_preset.objective, network, encoding)
    first = _first_cells(files, encoding, config)
    config = _with_token_budget(config, out, network, objective, first)
    _check_same_run(out, config, fingerprint)
    stream = CellStream(
        files,
        encoding,
        batch_cells=max(1, int(config.tokens_per_step * first.n_cells / max(1, first.n_tokens))),
        seed=config.fit.seed,
        rank=rank,
        world_size=world_size,
        layer=config.layer,
        gene_key=config.gene_key,
        depth_key=config.depth_key,
    )
    try:
        module = train(network, objective, stream, config.fit, title="pretraining", run_dir=out, progress=progress)
    except (KeyboardInterrupt, SystemExit) as stop:
        if any((out / "checkpoints").glob("*.ckpt")):
            stop.add_note(f"Checkpoints are in {out / 'checkpoints'}; the same call goes on from the newest.")
        raise
    losses = [float(loss) for loss in module.losses]
    stage = {"name": "pretraining", "objective": objective.name, "config": config.to_dict(), "losses": losses}
    encoding = _after_training(encoding, config.chosen_preset)
    model = Model(network, encoding, history={"stages": [stage], "data": fingerprint})
    if rank == 0:
        write_run(out, model, config.to_dict(), fingerprint, losses)
    return model


def _after_training(encoding: Encoding, preset: Preset) -> Encoding:
    """Return the encoding without the settings that only training needs."""
    settings = EncodingConfig(**preset.encoding)
    return encoding.replace(
        **{name: getattr(settings, name) for name in OBJECTIVES[preset.objective].encoding_settings}
    )


def learn_encoding(files: Sequence[Path], config: PretrainConfig) -> Encoding:
    """Build one vocabulary over all files, and learn from cells spread evenly over them what the encoding needs."""
    preset = config.chosen_preset
    settings = EncodingConfig(**preset.encoding).replace(**OBJECTIVES[preset.objective].encoding_settings)
    found = [build_vocabulary(_open(path, config), settings) for path in files]
    genes = list(dict.fromkeys(gene for each in found for gene in each.genes))
    vocabulary = Vocabulary.from_genes(genes, special=list(found[0].special))
    most = max(1, MOST_CELLS_TO_LEARN_FROM // len(files))
    # Every file has columns of its own; the blocks are brought to those of the vocabulary.
    every = GeneMap.from_names(list(vocabulary.genes), vocabulary)
    return ENCODINGS[settings.kind].fit(_aligned_blocks(files, every, config, most), every, settings)


def _aligned_blocks(
    files: Sequence[Path], every: GeneMap, config: PretrainConfig, most: int
) -> Iterator[tuple[sparse.csr_matrix, NDArray[np.float64]]]:
    column_of_token = np.full(len(every.vocabulary), -1, dtype=np.int64)
    column_of_token[every.token_ids] = np.arange(every.n_vars)
    for path in files:
        counts = _open(path, config)
        genes = GeneMap.of(counts, every.vocabulary, min_coverage=0)
        known = np.flatnonzero(genes.token_ids >= 0)
        columns = column_of_token[genes.token_ids[known]]
        select = sparse.csr_matrix(
            (np.ones(len(known), np.float32), (known, columns)), shape=(counts.n_vars, every.n_vars)
        )
        chunks = np.arange(0, counts.n_obs, CHUNK_CELLS)
        spread = np.linspace(0, len(chunks) - 1, num=min(len(chunks), max(1, most // CHUNK_CELLS)), dtype=int)
        for start in chunks[spread].tolist():
            for _, block, depth_B in counts.blocks(start=start, stop=min(counts.n_obs, start + CHUNK_CELLS)):
                yield (block @ select).tocsr(), depth_B


def _open(path: Path, config: PretrainConfig) -> CountSource:
    return CountSource.of(path, layer=config.layer, gene_key=config.gene_key, depth_key=config.depth_key)


def _network(encoding: Encoding, config: PretrainConfig) -> CellTransformer:
    vocabulary = encoding.vocabulary
    model_config = config.chosen_preset.model_config(n_tokens=len(vocabulary), pad_id=vocabulary.pad_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.fit.seed)
        # A gene embedding that a family freezes was trained elsewhere (scBERT: gene2vec); here it starts from nothing.
        return CellTransformer.for_vocabulary(model_config.replace(embedding={"train_genes": True}), vocabulary)


def _with_token_budget(
    config: PretrainConfig, out: Path, network: CellTransformer, objective: Objective, cells: CellBatch
) -> PretrainConfig:
    """Fill in the token budget: as the run in `out` has it, or measured."""
    if config.fit.tokens_per_step is not None:
        return config
    path = out / "config.json"
    if path.exists():
        tokens = json.loads(path.read_text())["pretrain"]["fit"]["tokens_per_step"]
    else:
        tokens = choose_tokens_per_step(network, objective, cells, device=training_device(config.fit))
    return replace(config, fit=config.fit.replace(tokens_per_step=tokens))


def _first_cells(files: Sequence[Path], encoding: Encoding, config: PretrainConfig) -> CellBatch:
    """The first cells of each file, by which the sizes of batches are judged."""
    firsts: list[CellBatch] = []
    for path in files[:20]:
        counts = _open(path, config)
        genes = GeneMap.of(counts, encoding.vocabulary)
        blocks = counts.blocks(stop=min(256, counts.n_obs))
        firsts += [encoding.encode(block, genes, depth_B=depth_B) for _, block, depth_B in blocks]
    return CellBatch.concat(firsts)


def data_fingerprint(files: Sequence[Path]) -> dict[str, Any]:
    """What tells data sets apart without reading them whole: names, numbers of cells, sizes, and a hash over them."""
    entries = [
        {"file": path.name, "n_obs": count_rows(path), "bytes": path.stat().st_size if path.is_file() else None}
        for path in files
    ]
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return {"sha256": digest, "files": entries, "n_obs": sum(entry["n_obs"] for entry in entries)}


def _check_same_run(out: Path, config: PretrainConfig, fingerprint: dict[str, Any]) -> None:
    """Refuse to go on in a folder that holds another run; note this one's settings where there is none."""
    path = out / "config.json"
    wanted = {"pretrain": config.to_dict(), "data": fingerprint["sha256"], "scfm_version": version("single-cell-fm")}
    if path.exists():
        there = json.loads(path.read_text())
        differing = [key for key in ("pretrain", "data") if there.get(key) != wanted[key]]
        if differing:
            raise ValueError(
                f"{out} holds a run with other {' and '.join('settings' if key == 'pretrain' else 'data' for key in differing)}. "
                "Choose another output folder, or give the same settings and data to go on with that run."
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=1))
