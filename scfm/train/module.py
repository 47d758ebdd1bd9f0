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


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class TrainingModule(lightning.LightningModule):
    """Trains a network on one objective; batches arrive corrupted, as (inputs, targets)."""

    def __init__(self, network: CellTransformer, objective: objectives.Objective, config: FitConfig) -> None:
        super().__init__()
        self.network, self.objective, self.config = network, objective, config
        self.losses: list[Tensor] = []
        self.cells_seen = 0

    def training_step(self, batch: tuple[CellBatch, objectives.Targets], batch_index: int) -> Tensor:
        inputs, targets = batch
        loss = objectives.total(self.objective.loss(self.network, inputs, targets))
        self.losses.append(loss.detach())
        self.cells_seen += len(inputs)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            parameter_groups(self.network, self.config.weight_decay), lr=self.config.learning_rate, fused=True
        )
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


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases, norms and embeddings' offsets alone."""

    def trainable(matrices: bool) -> Iterator[nn.Parameter]:
        return (p for p in network.parameters() if p.requires_grad and (p.dim() >= 2) == matrices)

    return [
        {"params": list(trainable(True)), "weight_decay": weight_decay},
        {"params": list(trainable(False)), "weight_decay": 0.0},
    ]
