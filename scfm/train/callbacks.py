"""Callbacks: the progress bar, the guard against a loss that is not a number, and the clean stop."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch
from tqdm.auto import tqdm

from scfm.train.module import NonFiniteLossError

REFRESH_STEPS = 5  # reading the loss waits for the device, so not at every step


class ProgressBar(lightning.Callback):
    """One line a stage: loss, cells per second, time left."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, desc=self.title, unit="step", mininterval=0.5
            )
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        if trainer.global_step % REFRESH_STEPS == 0 or trainer.global_step == trainer.max_steps:
            seconds = time.perf_counter() - self.started
            loss = float(torch.stack(module.losses[-REFRESH_STEPS:]).mean())
            rate = module.cells_seen * trainer.world_size / seconds
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} cells/s", refresh=False)
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
    """Stop when the loss is NaN or infinite, with the step and the cells of its batch named.

    The loss is read every few steps, so that the device need not be waited for at each one.
    """

    def __init__(self) -> None:
        self.recent: list[tuple[int, torch.Tensor | None]] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self.recent.append((trainer.global_step, batch[0].cell_index_B))
        if len(self.recent) < REFRESH_STEPS and trainer.global_step != trainer.max_steps:
            return
        losses = torch.stack(module.losses[-len(self.recent) :]).cpu()
        seen, self.recent = self.recent, []
        if bool(losses.isfinite().all()):
            return
        place = int((~losses.isfinite()).nonzero()[0])
        step, cells = seen[place]
        named = "unknown" if cells is None else ", ".join(map(str, cells.tolist()[:10])) + ", ..."
        raise NonFiniteLossError(
            f"The loss became {float(losses[place])} at step {step}, in the batch of cells {named} (rows of the data). "
            "Lower `learning_rate`, raise `warmup_fraction`, use precision='32-true', or look at these cells."
        )


class CleanStop(lightning.Callback):
    """Remember that the user interrupted, so that what was learned is kept and the call returns."""

    def __init__(self) -> None:
        self.stopped_at: int | None = None

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.stopped_at = trainer.global_step
