"""`train`: run one stage of training on encoded cells, in memory or streamed."""

from __future__ import annotations

import logging
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from scfm.train.budget import choose_tokens_per_step
from scfm.train.callbacks import REFRESH_STEPS, CleanStop, KeepCheckpoints, ProgressBar, StopOnNonFiniteLoss
from scfm.train.checkpoints import Resumption, read_checkpoint
from scfm.train.config import CPU_TOKENS_PER_STEP, STAGE_DEFAULTS, FitConfig
from scfm.train.module import TrainingModule
from scfm.train.plugins import AtomicCheckpointIO
from scfm.train.precision import own_device, precision_plugins, resolved_precision, training_device
from scfm.train.ranks import devices_and_nodes, lanes_of
from scfm.train.sharding import GatherShards, is_sharded, is_shards, joined_weights, make_strategy
from scfm.train.speed import Speed
from scfm.train.steps import MemorySource, Source, Steps, pinned
from scfm.train.trainable import (
    compile_blocks,
    freeze_unused,
    keep_activations,
    merge,
    recompute_blocks,
    run_eagerly,
    set_trainable,
)

logger = logging.getLogger(__name__)

LOG_STEPS = 10  # steps per line of the log; not each step, because reading a loss waits for the device


def train(
    network: CellTransformer,
    objective: objectives.Objective,
    cells: CellBatch | Sequence[Source],
    config: FitConfig,
    *,
    title: str,
    validation: CellBatch | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[lightning.Callback] = (),
) -> TrainingModule:
    """Train `network` in place.

    With the same seed, machine and number of threads the result is bitwise identical, even if the run was killed and started
    again with the same `run_dir`. A run can be resumed with another number of processes, which share the batches of a step.

    Parameters
    ----------
    network, objective
        The network to train, and the objective that defines its loss.
    cells
        Encoded cells in memory, or a list of sources of batches, such as streams from files. The list has one source for each
        batch of a step that this process computes.
    config
        Settings of the training.
    title
        Text of the progress bar.
    validation
        Cells on which the loss is measured during training. The weights with the lowest loss are kept.
    run_dir
        Folder for checkpoints (`checkpoints/`) and logs (`logs/metrics.csv`, or `logs_from_STEP/` for a resumed run, and
        `tensorboard/` if tensorboard is installed). If it contains checkpoints, the run resumes from the newest readable
        one.
    progress
        Whether to show a progress bar.
    callbacks
        Further Lightning callbacks.

    Returns
    -------
    The Lightning module, with the attributes `losses` (one per step) and `validation_losses`.

    Raises
    ------
    NonFiniteLossError
        If the loss becomes NaN or infinite. The message names the step and the cells.

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
    config, resumed = _complete(config, network, objective, cells), Resumption.newest(run_dir)
    config = config if resumed is None else resumed.divided(config)
    assert config.trainable is not None
    assert config.n_steps is not None
    n_trainable = set_trainable(network, config.trainable)
    logger.info("%s: %s parameters are trained", title, f"{n_trainable:,}")
    # Checked for any number of processes, because a run may be resumed with another number.
    freeze_unused(network, objectives.at_step(objective, config.n_steps), _some_cells(cells))
    strategy = make_strategy(config, resumes_shards=resumed is not None and is_shards(resumed.path))
    shards = GatherShards(network) if is_sharded(strategy) else None
    trained = network if shards is None else shards.copy
    with (
        tempfile.TemporaryDirectory() as scratch,
        _prepared(trained, config),
        quiet_lightning(),
        torch.random.fork_rng(),
    ):
        module = TrainingModule(trained, objective, config)
        best = _keep_best(Path(run_dir or scratch) / "checkpoints") if validation is not None else None
        keeper = None if run_dir is None else KeepCheckpoints(run_dir, config)
        stop = CleanStop(keeper)
        speed = Speed(REFRESH_STEPS)
        watching = [StopOnNonFiniteLoss(), speed, *([ProgressBar(title, speed)] if progress else [])]
        watching += [shards] if shards else []
        ending = [*_early_stopping(config, best), *([keeper] if keeper else []), stop]
        loggers = [] if run_dir is None else _loggers(Path(run_dir), resumed.step if resumed else 0)
        trainer = _trainer(config, strategy, [*watching, *callbacks, *ending], loggers, validates=best is not None)
        trained.train()
        with stop.listening(), _normal_end_after(stop):
            trainer.fit(
                module,
                _loader(cells, objective, config, start=resumed.step if resumed else 0),
                None if validation is None else _validation_loader(validation, objective, config),
                ckpt_path=resumed.path if resumed else None,
            )
        if stop.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if stop.stopped_at is not None:
            warnings.warn(
                f"Interrupted after {stop.stopped_at} of {config.n_steps} steps; the weights reached by then are kept.",
                stacklevel=2,
            )
        if best is not None and best.best_model_path:
            path = Path(best.best_model_path)
            state = joined_weights(path, Path(scratch)) if is_shards(path) else read_checkpoint(path)["state_dict"]
            network.load_state_dict(
                {name.removeprefix("network."): tensor for name, tensor in state.items() if name.startswith("network.")}
            )
    if config.precision == "bf16-true":
        network.float()
    merge(network)
    network.eval().to(
        own_device(config)
    )  # Lightning moves the network to the CPU, but later passes over all cells need the device
    return module


def _complete(
    config: FitConfig, network: CellTransformer, objective: objectives.Objective, cells: CellBatch | Sequence[Source]
) -> FitConfig:
    """Fill in the settings whose defaults depend on the device or on the stage."""
    config = config.with_defaults(**STAGE_DEFAULTS)
    if config.tokens_per_step is not None or not isinstance(cells, CellBatch):
        return config
    tokens = choose_tokens_per_step(network, objective, cells, config, device=training_device(config))
    return config.replace(tokens_per_step=tokens)


def _some_cells(cells: CellBatch | Sequence[Source]) -> CellBatch:
    if isinstance(cells, CellBatch):
        return cells.select(range(min(8, len(cells))))
    first = next(iter(cells[0]))
    return first.select(range(min(8, len(first))))


@contextmanager
def _prepared(network: CellTransformer, config: FitConfig) -> Iterator[None]:
    """Apply the settings of compilation, recomputation and precision to the blocks during the training."""
    if config.activation_checkpointing:
        recompute_blocks(network)
    if config.compile:
        compile_blocks(network)
    precision = torch.get_float32_matmul_precision()
    if config.precision == "auto" and training_device(config).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        keep_activations(network)
        run_eagerly(network)


@contextmanager
def _normal_end_after(stop: CleanStop) -> Iterator[None]:
    """Suppress the SystemExit that Lightning raises after a signal, if the weights were saved."""
    try:
        yield
    except SystemExit:
        if stop.stopped_at is None:
            raise


def _loader(
    cells: CellBatch | Sequence[Source], objective: objectives.Objective, config: FitConfig, start: int
) -> DataLoader:
    lanes, n_lanes = lanes_of(config)
    assert config.seed is not None
    assert config.n_steps is not None
    if isinstance(cells, CellBatch):
        assert config.tokens_per_step is not None
        lengths_B = cells.lengths_B.numpy()
        sources: Sequence[Source] = [
            MemorySource(
                cells,
                TokenBudgetSampler(
                    lengths_B, max_tokens=config.tokens_per_step, seed=config.seed, rank=lane, world_size=n_lanes
                ),
            )
            for lane in lanes
        ]
    else:
        sources = cells
    steps = Steps(
        sources,
        lanes,
        objective,
        config.seed,
        stop=config.n_steps,
        n_lanes=n_lanes,
        start=start,
        device=training_device(config),
    )
    return DataLoader(steps, batch_size=None)


def _validation_loader(cells: CellBatch, objective: objectives.Objective, config: FitConfig) -> DataLoader:
    """Load validation batches with the same masks at every validation, so that losses can be compared."""
    tokens = config.tokens_per_step or CPU_TOKENS_PER_STEP
    sampler = TokenBudgetSampler(cells.lengths_B.numpy(), max_tokens=tokens, shuffle=False)
    batches = [
        objective.corrupt(cells.select(rows), torch.Generator().manual_seed(number))
        for number, rows in enumerate(sampler)
    ]
    if training_device(config).type == "cuda":
        batches = [pinned(batch) for batch in batches]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def _keep_best(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "best", monitor="validation_loss", save_weights_only=True, enable_version_counter=False
    )


def _early_stopping(config: FitConfig, best: ModelCheckpoint | None) -> list[lightning.Callback]:
    if best is None:
        return []
    if config.patience is None:
        return [best]
    return [best, EarlyStopping("validation_loss", patience=config.patience, check_finite=False)]


def _loggers(run_dir: Path, step: int) -> list[Logger]:
    """Return a CSV logger, and one for TensorBoard if it is installed. Each start has its own folder: Lightning empties it."""
    version = "logs" if step == 0 else f"logs_from_{step}"
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version=version, flush_logs_every_n_steps=LOG_STEPS)]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    return loggers


def _trainer(
    config: FitConfig, strategy: Strategy | str, callbacks: list[Any], loggers: list[Logger], *, validates: bool
) -> lightning.Trainer:
    devices, n_nodes = devices_and_nodes(config)
    assert config.n_steps is not None
    return lightning.Trainer(
        max_steps=config.n_steps,
        max_epochs=-1,
        accelerator=config.accelerator,
        devices=devices,
        num_nodes=n_nodes,
        strategy=strategy,
        gradient_clip_val=config.clip_norm,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.steps_between_validations * config.accumulate if validates else None,
        num_sanity_val_steps=0,
        logger=loggers or False,
        log_every_n_steps=LOG_STEPS,
        plugins=[AtomicCheckpointIO(), *precision_plugins(config)],
        precision=None if config.precision == "bf16-true" else resolved_precision(config),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's warnings about workers and its messages about devices."""
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
