"""Callbacks: the progress bar, and the guard against a loss that is not a number."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch
from tqdm.auto import tqdm

from scfm.train.module import NonFiniteLossError, TrainingModule

REFRESH_STEPS = 5  # reading the loss waits for the device, so not at every step


class ProgressBar(lightning.Callback):
    """One line a stage: loss, cells per second, time left."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc=self.title, unit="step")
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if self.bar is None:
            return
        if trainer.global_step % REFRESH_STEPS == 0 or trainer.global_step == trainer.max_steps:
            seconds = time.perf_counter() - self.started
            loss = float(torch.stack(module.losses[-REFRESH_STEPS:]).mean())
            self.bar.set_postfix_str(f"loss {loss:.3f}, {module.cells_seen / seconds:,.0f} cells/s", refresh=False)
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
    """Stop with the step and the cells named when the loss is NaN or infinite."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step % REFRESH_STEPS and trainer.global_step != trainer.max_steps:
            return
        recent = torch.stack(module.losses[-REFRESH_STEPS:]).cpu()
        if not bool(recent.isfinite().all()):
            first_bad = trainer.global_step - len(recent) + int((~recent.isfinite()).nonzero()[0])
            cells = batch[0].cell_index_B
            raise NonFiniteLossError(
                f"The loss became {float(recent[~recent.isfinite()][0])} at step {first_bad + 1} "
                f"(last batch: cells {[] if cells is None else cells.tolist()[:10]}). "
                "Lower `learning_rate`, raise `warmup_fraction`, or use precision='32-true'."
            )


__all__ = ["NonFiniteLossError", "ProgressBar", "StopOnNonFiniteLoss", "TrainingModule"]
