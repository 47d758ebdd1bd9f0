"""`train`: run one stage of training on encoded cells, in memory or streamed."""

from __future__ import annotations

import logging
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from torch.utils.data import DataLoader

from scfm import objectives
from scfm.data import CellBatch, TokenBudgetSampler
from scfm.models.network import CellTransformer
from scfm.train.budget import choose_tokens_per_step, training_device
from scfm.train.callbacks import CleanStop, ProgressBar, StopOnNonFiniteLoss
from scfm.train.checkpoints import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from scfm.train.config import STAGE_DEFAULTS, FitConfig
from scfm.train.module import TrainingModule
from scfm.train.ranks import rank_and_world_size
from scfm.train.sharding import GatherShards, ShardedPrecision, is_sharded, make_strategy
from scfm.train.steps import MemorySource, Steps
from scfm.train.stream import CellStream
from scfm.train.trainable import keep_activations, merge, recompute_blocks, set_trainable

logger = logging.getLogger(__name__)

LOG_STEPS = 10  # between two lines of a log; reading a loss waits for the device


def train(
    network: CellTransformer,
    objective: objectives.Objective,
    cells: CellBatch | CellStream,
    config: FitConfig,
    *,
    title: str,
    validation: CellBatch | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[lightning.Callback] = (),
) -> TrainingModule:
    """Train `network` in place.

    With the same seed, machine and thread count the result is the same to the bit, also of a run that was killed and
    started again with the same `run_dir`.

    Parameters
    ----------
    network, objective
        What is trained, and on what.
    cells
        Encoded cells in memory, or a stream from files (of this rank).
    config
        All settings.
    title
        What the progress bar says.
    validation
        Cells to validate on every `config.validate_every` steps; the weights with the lowest loss are kept.
    run_dir
        Folder of checkpoints (`checkpoints/`) and logs (`logs/metrics.csv`, after a resumption `logs_from_STEP/`, and
        `tensorboard/` where tensorboard is installed). A run that finds checkpoints there goes on from the newest
        readable one.
    progress
        Whether to show a progress bar.
    callbacks
        Lightning callbacks of the user.

    Returns
    -------
    The Lightning module, with `losses` of every step and `validation_losses`.

    Raises
    ------
    NonFiniteLossError
        If the loss becomes NaN or infinite; names step and cells.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:50]
    >>> encoding = scfm.encoding.make_encoding("rank", adata=adata)
    >>> sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1}
    >>> network = scfm.models.CellTransformer.for_vocabulary(
    ...     scfm.ModelConfig(n_tokens=len(encoding.vocabulary), **sizes), encoding.vocabulary
    ... )
    >>> objective = scfm.objectives.make_objective("masked_genes", network, encoding)
    >>> config = scfm.FitConfig(n_steps=3, tokens_per_step=512)
    >>> run = scfm.train.train(
    ...     network, objective, scfm.pp.encode(adata, encoding), config, title="example", progress=False
    ... )
    >>> len(run.losses)
    3
    """
    config = config.with_defaults(**STAGE_DEFAULTS)
    if config.tokens_per_step is None and isinstance(cells, CellBatch):
        config = config.replace(
            tokens_per_step=choose_tokens_per_step(network, objective, cells, device=training_device(config))
        )
    assert config.trainable is not None
    n_trainable = set_trainable(network, config.trainable)
    logger.info("%s: %s parameters are trained", title, f"{n_trainable:,}")
    strategy = make_strategy(config)
    shards = GatherShards(network) if is_sharded(strategy) else None
    trained = network if shards is None else shards.copy
    if config.activation_checkpointing:
        recompute_blocks(trained)
    module = TrainingModule(trained, objective, config)
    stop, scratch = CleanStop(), tempfile.TemporaryDirectory()
    resumed = None if run_dir is None else newest_checkpoint(Path(run_dir) / "checkpoints")
    best = _keep_best(Path(scratch.name)) if validation is not None else None
    own = [StopOnNonFiniteLoss(), stop, *([ProgressBar(title)] if progress else []), *_keepers(config, run_dir, best)]
    own += [shards] if shards is not None else []
    loggers = [] if run_dir is None else _loggers(Path(run_dir), resumed[1] if resumed else 0)
    with scratch, quiet_lightning(), _restored_interrupts(), torch.random.fork_rng():
        trainer = _trainer(config, strategy, [*own, *callbacks], loggers, validates=validation is not None)
        loader = _loader(cells, objective, config, start=resumed[1] * config.accumulate if resumed else 0)
        trained.train()
        try:
            trainer.fit(
                module,
                loader,
                None if validation is None else _validation_loader(validation, objective, config),
                ckpt_path=resumed[0] if resumed else None,
            )
        except SystemExit:
            if stop.stopped_at is None:
                raise
            warnings.warn(
                f"Interrupted after {stop.stopped_at} of {config.n_steps} steps; the weights reached by then are kept.",
                stacklevel=2,
            )
        if best is not None and best.best_model_path:
            state = read_checkpoint(Path(best.best_model_path))["state_dict"]
            network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in state.items()})
    merge(network)
    keep_activations(network)
    network.eval()
    return module


def _loader(
    cells: CellBatch | CellStream, objective: objectives.Objective, config: FitConfig, start: int
) -> DataLoader:
    rank, world_size = rank_and_world_size(config)
    if isinstance(cells, CellStream):  # which cuts its own batches
        source: MemorySource | CellStream = cells
    else:
        assert config.tokens_per_step is not None
        sampler = TokenBudgetSampler(
            cells.lengths_B.numpy(),
            max_tokens=config.tokens_per_step,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )
        source = MemorySource(cells, sampler)
    steps = Steps(source, objective, config.seed, stop=config.n_steps * config.accumulate, start=start, rank=rank)
    return DataLoader(steps, batch_size=None)


def _validation_loader(cells: CellBatch, objective: objectives.Objective, config: FitConfig) -> DataLoader:
    """The same masks at every validation, so that losses compare."""
    sampler = TokenBudgetSampler(cells.lengths_B.numpy(), max_tokens=config.tokens_per_step or 8192, shuffle=False)
    batches = [
        objective.corrupt(cells.select(rows), torch.Generator().manual_seed(number))
        for number, rows in enumerate(sampler)
    ]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def _keep_best(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "best", monitor="validation_loss", save_weights_only=True, enable_version_counter=False
    )


def _keepers(config: FitConfig, run_dir: str | Path | None, best: ModelCheckpoint | None) -> list[lightning.Callback]:
    keepers: list[lightning.Callback] = [best] if best is not None else []
    if best is not None and config.patience is not None:
        keepers.append(EarlyStopping("validation_loss", patience=config.patience, check_finite=False))
    if run_dir is not None:
        folder = Path(run_dir) / "checkpoints"
        # The last two: where the newest turns out damaged, the one before it serves.
        keepers.append(
            ModelCheckpoint(
                folder, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=config.checkpoint_every
            )
        )
    return keepers


def _loggers(run_dir: Path, step: int) -> list[Logger]:
    """CSV always, in a folder of its own for each start, since Lightning empties it; TensorBoard where it is installed."""
    version = "logs" if step == 0 else f"logs_from_{step}"
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version=version, flush_logs_every_n_steps=LOG_STEPS)]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    return loggers


def _trainer(
    config: FitConfig, strategy: Strategy | str, callbacks: list[Any], loggers: list[Logger], *, validates: bool
) -> lightning.Trainer:
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    plugins: list[Any] = [AtomicCheckpointIO()]
    plugins += [ShardedPrecision(config.precision)] if is_sharded(strategy) else []
    return lightning.Trainer(
        max_steps=config.n_steps,
        max_epochs=-1,
        accelerator="cuda" if config.strategy == "fsdp" else config.accelerator,
        devices=config.devices,
        num_nodes=config.n_nodes,
        strategy=strategy,
        precision=None if is_sharded(strategy) else config.precision,
        gradient_clip_val=config.clip_norm,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.validate_every * config.accumulate if validates else None,
        num_sanity_val_steps=0,
        logger=loggers or False,
        log_every_n_steps=LOG_STEPS,
        plugins=plugins,
        enable_checkpointing=keeps,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave Lightning's warnings about workers and its notes about devices out of a user's notebook."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", category=UserWarning, message=r".*does not have many workers.*")
        try:
            yield
        finally:
            for each, level in zip(loggers, levels):
                each.setLevel(level)


@contextmanager
def _restored_interrupts() -> Iterator[None]:
    """Give Ctrl-C its meaning back: Lightning ignores it for good after the first one."""
    try:
        handler = signal.getsignal(signal.SIGINT)
    except ValueError:
        handler = None
    try:
        yield
    finally:
        if handler is not None:
            with suppress(ValueError):  # not the main thread: then Lightning could not change it either
                signal.signal(signal.SIGINT, handler)
