"""The Lightning module: the loss of one objective, AdamW, and the schedule of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from scfm import objectives
from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.objectives.base import weights_of
from scfm.train.config import STAGE_DEFAULTS, FitConfig
from scfm.train.ranks import lanes_of
from scfm.train.sharding import is_sharded, shard
from scfm.train.steps import sent, step_seed


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class TrainingModule(lightning.LightningModule):
    """Train a network on one objective. Batches are pairs (inputs, targets) that the objective has already corrupted.

    Examples
    --------
    >>> import scfm
    >>> network = scfm.models.CellTransformer(scfm.ModelConfig(n_tokens=50, d_model=32, n_heads=2, n_layers=1))
    >>> objective = scfm.objectives.MaskedGenes(mask_id=1, is_gene_V=network.is_gene_V)
    >>> config = scfm.FitConfig(n_steps=100, warmup_fraction=0.1)
    >>> module = scfm.train.TrainingModule(network, objective, config)
    >>> [round(module.rate_at(step), 2) for step in (0, 10, 55, 100)]  # warm-up, then half a cosine
    [0.1, 1.0, 0.5, 0.0]
    """

    def __init__(self, network: CellTransformer, objective: objectives.Objective, config: FitConfig) -> None:
        super().__init__()
        self.network, self.objective, self.config = network, objective, config.with_defaults(**STAGE_DEFAULTS)
        self.objective_weights = weights_of(objective)  # registered here, so that checkpoints and shards include them
        self.lanes, self.n_lanes = lanes_of(self.config)
        self.losses: list[Tensor] = []  # loss of each step: the mean over its batches on all processes
        self._of_step: list[Tensor] = []
        self.validation_losses: list[tuple[int, float]] = []
        self.cell_index_B: Tensor | None = None  # cell numbers of the current batch, on the CPU

    def configure_model(self) -> None:
        if is_sharded(self.trainer.strategy):
            if self.config.precision == "bf16-true":
                self.bfloat16()
            shard(self, self.network)

    def forward(
        self, inputs: CellBatch, targets: objectives.Targets, objective: objectives.Objective
    ) -> tuple[Tensor, objectives.Loss]:
        """Return the loss of a batch and its terms. FSDP gathers the shards during this forward pass."""
        terms = objective.loss(self.network, inputs, targets)
        return objectives.total(terms), terms

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move to the device what a step needs. Cell numbers stay on the CPU, because only messages use them."""
        inputs, targets = batch
        self.cell_index_B = inputs.cell_index_B
        inputs = inputs.replace(cell_index_B=None) if device.type == "cuda" else inputs
        return sent((inputs, targets), device)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # The seed of dropout depends on the number of the batch only, so a resumed run has the same dropout.
        lane = self.lanes[batch_index % len(self.lanes)]
        assert self.config.seed is not None
        torch.manual_seed(step_seed(self.config.seed, self.trainer.global_step * self.n_lanes + lane))

    def training_step(self, batch: tuple[CellBatch, objectives.Targets], batch_index: int) -> Tensor:
        inputs, targets = batch
        objective = objectives.at_step(self.objective, self.trainer.global_step)
        loss, terms = self(inputs, targets, objective)
        self._log(loss, terms)
        self._of_step.append(loss.detach())
        if len(self._of_step) == len(self.lanes):
            mean = torch.stack(self._of_step).mean()
            if self.trainer.world_size > 1:
                mean = self.trainer.strategy.reduce(mean, reduce_op="mean")
            self.losses.append(mean)
            self._of_step = []
        return loss

    def _log(self, loss: Tensor, terms: objectives.Loss) -> None:
        """Pass the loss, its terms and the learning rate to the loggers, which write them every few steps."""
        if self.trainer.loggers:
            values = {
                "loss": loss,
                "learning_rate": (self.config.learning_rate or 0) * self.rate_at(self.trainer.global_step),
            }
            values |= {f"loss_{name}": term.mean for name, term in terms.items()} if len(terms) > 1 else {}
            self.log_dict({name: torch.as_tensor(value).detach() for name, value in values.items()}, batch_size=1)

    def validation_step(self, batch: tuple[CellBatch, objectives.Targets], batch_index: int) -> None:
        loss, _ = self(*batch, self.objective)
        self.log("validation_loss", loss, batch_size=len(batch[0]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            value = float(self.trainer.callback_metrics["validation_loss"])
            self.validation_losses.append((self.trainer.global_step, value))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["n_lanes"] = self.n_lanes
        checkpoint["losses"] = torch.stack(self.losses).float().cpu() if self.losses else torch.zeros(0)
        checkpoint["validation_losses"] = list(self.validation_losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = list(checkpoint["losses"])
        self.validation_losses = [tuple(pair) for pair in checkpoint["validation_losses"]]
        # Lightning counts batches of this process; in a resumed run, a step may have another number of them.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        n_batches = checkpoint["global_step"] * len(self.lanes)
        for counts in (progress["total"], progress["current"]):
            counts.update(ready=n_batches, started=n_batches, processed=n_batches, completed=n_batches - 1)
        progress["is_last_batch"] = False

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.network, self.config, self.objective_weights)
        fused = self.config.precision != "16-mixed"  # a fused optimizer prevents clipping of scaled gradients
        optimizer = torch.optim.AdamW(groups, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.config.precision == "16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            # Lightning refuses to clip with a fused optimizer in bf16-mixed, although no gradients are scaled there.
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def rate_at(self, step: int) -> float:
        """Learning rate at a step, as a fraction of the peak."""
        assert self.config.n_steps is not None
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


def parameter_groups(
    network: nn.Module, config: FitConfig, objective_weights: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Group parameters by weight decay (for matrices only) and learning rate.

    The gene embedding and the weights of the objective, which have a row for each gene, may have a rate of their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    own = () if objective_weights is None else objective_weights.named_parameters(prefix="objective")
    for name, parameter in (*network.named_parameters(), *own):
        if parameter.requires_grad:
            weight_decay = config.weight_decay if parameter.dim() >= 2 else 0.0
            is_of_genes = name == "embedding.gene.weight" or name.startswith("objective.")
            scale = config.embedding_learning_rate_scale if is_of_genes else None
            scale = 1.0 if scale is None else scale
            groups.setdefault((weight_decay, scale), []).append(parameter)
    assert config.learning_rate is not None
    return [
        {"params": parameters, "weight_decay": weight_decay, "lr": scale * config.learning_rate}
        for (weight_decay, scale), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1]))
    ]
