"""Callbacks: progress bar, stop on a loss that is not finite, checkpoints, and stop after a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from tqdm.auto import tqdm

from scfm.train.checkpoints import SUFFIX, checkpoints_of, remove_checkpoint
from scfm.train.config import FitConfig
from scfm.train.module import NonFiniteLossError
from scfm.train.speed import Speed

REFRESH_STEPS = 5  # reading the loss waits for the device, so it is not done at every step


class ProgressBar(lightning.Callback):
    """One progress bar per stage with loss, rates and remaining time."""

    def __init__(self, title: str, speed: Speed) -> None:
        self.title, self.speed = title, speed
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, desc=self.title, unit="step", mininterval=0.5
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        if trainer.global_step % REFRESH_STEPS == 0 or trainer.global_step == trainer.max_steps:
            loss = float(torch.stack(module.losses[-REFRESH_STEPS:]).mean())
            rates = "" if self.speed.latest is None else f", {self.speed.latest}"
            self.bar.set_postfix_str(f"loss {loss:.3f}{rates}", refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnNonFiniteLoss(lightning.Callback):
    """Stop with an error if the loss is NaN or infinite; the error names the step and the cells of its batch.

    The loss is read every few steps, because reading it waits for the device.
    """

    def __init__(self) -> None:
        self.recent: list[tuple[int, list[Any]]] = []  # steps and the cells of their batches
        self.cells: list[Any] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        index_B = module.cell_index_B
        self.cells += ["unknown"] if index_B is None else index_B[:10].tolist()
        if (batch_index + 1) % trainer.accumulate_grad_batches:
            return
        self.recent.append((trainer.global_step, self.cells))
        self.cells = []
        if len(self.recent) < REFRESH_STEPS and trainer.global_step != trainer.max_steps:
            return
        losses = torch.stack(module.losses[-len(self.recent) :]).cpu()
        seen, self.recent = self.recent, []
        if bool(losses.isfinite().all()):
            return
        first = int((~losses.isfinite()).nonzero()[0])
        step, cells = seen[first]
        named = ", ".join(map(str, cells[:10])) + ", ..."
        raise NonFiniteLossError(
            f"The loss became {float(losses[first])} at step {step}, in the batch of cells {named} (rows of the data). "
            "Lower `learning_rate`, raise `warmup_fraction`, use precision='32-true', or inspect these cells."
        )


class KeepCheckpoints(lightning.Callback):
    """Write a checkpoint after some steps or minutes, and keep the last two, in case the newest is damaged."""

    def __init__(self, run_dir: str | Path, config: FitConfig) -> None:
        self.folder, self.config = Path(run_dir) / "checkpoints", config
        self.saved_step, self.saved_at = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        step = trainer.global_step
        if step != self.saved_step and (step % self.config.checkpoint_every == 0 or self._is_overdue(trainer)):
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step == self.saved_step:
            return
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}{SUFFIX}")
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            for old in checkpoints_of(self.folder)[2:]:
                remove_checkpoint(old)

    def _is_overdue(self, trainer: lightning.Trainer) -> bool:
        minutes = self.config.checkpoint_minutes
        if minutes is None or trainer.global_step % REFRESH_STEPS:
            return False
        return _on_any_rank(trainer, time.monotonic() - self.saved_at > 60 * minutes)


class CleanStop(lightning.Callback):
    """After Ctrl-C or SIGTERM, stop at the end of the current step and write a checkpoint.

    A second Ctrl-C stops immediately. Several processes stop after the same step.
    """

    def __init__(self, keeper: KeepCheckpoints | None) -> None:
        self.keeper = keeper
        self.signal: int | None = None
        self.stopped_at: int | None = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if (batch_index + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1 and trainer.global_step % REFRESH_STEPS:
            return
        if _on_any_rank(trainer, self.signal is not None):
            self.signal = self.signal or signal.SIGTERM  # the signal came to another process
            self.stopped_at = trainer.global_step
            if self.keeper is not None:
                self.keeper.save(trainer)
            trainer.should_stop = True

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.signal, self.stopped_at = signal.SIGINT, trainer.global_step

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the `with` statement, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if callable(before[signal.SIGINT]):  # a shell starts background processes with this signal ignored
            signal.signal(signal.SIGINT, self._remember)
        if self.keeper is not None:
            signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # one that was not set by Python cannot be restored
                    signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def _on_any_rank(trainer: lightning.Trainer, decision: bool) -> bool:
    return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision
