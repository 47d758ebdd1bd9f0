"""FSDP: parameters, gradients and optimizer state are distributed over devices, for models too large for one device."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn

from scfm.models.network import CellTransformer
from scfm.nn import Block
from scfm.train.config import FitConfig
from scfm.train.ranks import rank_and_world_size

WRAPPER = "_fsdp_wrapped_module."  # FSDP adds this to the names of parameters


def make_strategy(config: FitConfig) -> Strategy | str:
    """Return Lightning's strategy: FSDP with one unit per block and complete checkpoints, or the name of another strategy.

    Raises
    ------
    ValueError
        If the strategy is "fsdp" on a machine without CUDA.
    """
    if config.strategy != "fsdp":
        return "ddp" if rank_and_world_size(config)[1] > 1 else "auto"
    if not torch.cuda.is_available():
        raise ValueError(
            "`strategy` is 'fsdp', which needs CUDA devices, but this machine has none. Use 'ddp' for several processes on "
            "the CPU, or 'auto'."
        )
    return FSDPStrategy(**FSDP_SETTINGS)


FSDP_SETTINGS: dict[str, Any] = {"auto_wrap_policy": {Block}, "state_dict_type": "full"}


def is_sharded(strategy: Strategy | str) -> bool:
    return isinstance(strategy, FSDPStrategy)


def plain_name(name: str) -> str:
    """Return the name of a parameter without the additions of FSDP."""
    return name.replace(WRAPPER, "")


class GatherShards(lightning.Callback):
    """Train a copy with FSDP, which changes a network permanently, and copy the weights to the original at the end."""

    def __init__(self, network: CellTransformer) -> None:
        self.original, self.copy = network, copy.deepcopy(network)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        state = trainer.strategy.broadcast(trainer.strategy.lightning_module_state_dict())
        whole = {plain_name(name).removeprefix("network."): tensor.cpu() for name, tensor in state.items()}
        self.original.load_state_dict(whole)


def matrices(network: nn.Module) -> set[str]:
    """Return the names of the parameters with two or more axes; call it before FSDP flattens parameters."""
    return {name for name, parameter in network.named_parameters() if parameter.dim() >= 2}
