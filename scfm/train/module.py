"""The Lightning module: one objective's loss, AdamW, and a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from scfm import objectives
from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.train.config import FitConfig
from scfm.train.steps import step_seed


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class TrainingModule(lightning.LightningModule):
    """Trains a network on one objective; batches arrive corrupted, as (inputs, targets)."""

    def __init__(self, network: CellTransformer, objective: objectives.Objective, config: FitConfig) -> None:
        super().__init__()
        self.network, self.objective, self.config = network, objective, config
        self.losses: list[Tensor] = []
        self.validation_losses: list[tuple[int, float]] = []
        self.cells_seen = 0

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Dropout of a batch depends on its number, not on what was drawn before: a resumed run draws the same.
        torch.manual_seed(step_seed(self.config.seed, self.trainer.global_step, self.global_rank))

    def training_step(self, batch: tuple[CellBatch, objectives.Targets], batch_index: int) -> Tensor:
        inputs, targets = batch
        objective = objectives.at_step(self.objective, self.trainer.global_step)
        loss = objectives.total(self._over_ranks(objective.loss(self.network, inputs, targets)))
        self.losses.append(loss.detach())
        self.cells_seen += len(inputs)
        return loss

    def validation_step(self, batch: tuple[CellBatch, objectives.Targets], batch_index: int) -> None:
        loss = objectives.total(self.objective.loss(self.network, *batch))
        self.log("validation_loss", loss, batch_size=len(batch[0]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            value = float(self.trainer.callback_metrics["validation_loss"])
            self.validation_losses.append((self.trainer.global_step, value))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = torch.stack(self.losses).float().cpu() if self.losses else torch.zeros(0)
        checkpoint["validation_losses"] = list(self.validation_losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = list(checkpoint["losses"])
        self.validation_losses = [tuple(pair) for pair in checkpoint["validation_losses"]]

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.network, self.config.weight_decay)
        fused = self.config.precision != "16-mixed"  # Lightning cannot clip scaled gradients inside a fused step
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate_at(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        n_warmup = round(self.config.warmup_fraction * self.config.n_steps)
        if step < n_warmup:
            return (step + 1) / n_warmup
        progress = (step - n_warmup) / max(1, self.config.n_steps - n_warmup)
        match self.config.schedule:
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
            case "linear":
                return max(0.0, 1 - progress)
            case _:
                return 1.0

    def _over_ranks(self, loss: objectives.Loss) -> objectives.Loss:
        """Divide by the mean count of all ranks: averaged gradients are then those of one process on the whole batch."""
        n_ranks = self.trainer.world_size
        if n_ranks == 1:
            return loss
        counts = torch.stack([term.count for term in loss.values()])
        torch.distributed.all_reduce(counts)
        return {
            name: objectives.Term(term.sum, count / n_ranks, term.weight)
            for (name, term), count in zip(loss.items(), counts)
        }


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases and norms alone."""

    def trainable(matrices: bool) -> Iterator[nn.Parameter]:
        return (p for p in network.parameters() if p.requires_grad and (p.dim() >= 2) == matrices)

    return [
        {"params": list(trainable(True)), "weight_decay": weight_decay},
        {"params": list(trainable(False)), "weight_decay": 0.0},
    ]
