"""The rank of this process in a run, and its batches of each step."""

from __future__ import annotations

import os

import torch
from torch import distributed

from scfm.data.ranks import torchrun_rank
from scfm.train.config import FitConfig


def rank_and_world_size(config: FitConfig) -> tuple[int, int]:
    """Return rank and number of processes from the environment of torchrun; without torchrun, there is one process.

    Raises
    ------
    ValueError
        If `devices` and `n_nodes` are for another number of processes than torchrun has started.
    """
    rank, world_size = torchrun_rank()
    asked = None if config.devices == "auto" else int(config.devices) * config.n_nodes
    if world_size == 1 and asked not in (None, 1):
        raise ValueError(
            f"`devices` is {config.devices!r} and `n_nodes` {config.n_nodes}. Start several processes with torchrun: "
            "`torchrun --nproc-per-node N $(which scfm) pretrain ...`."
        )
    if world_size > 1 and asked not in (None, world_size):
        raise ValueError(
            f"`devices` is {config.devices!r} and `n_nodes` {config.n_nodes}, but torchrun started {world_size} processes. "
            "Omit both to use all processes."
        )
    return rank, world_size


def devices_and_nodes(config: FitConfig) -> tuple[int, int]:
    """Return the number of processes per node, and the number of nodes, for Lightning."""
    world_size = rank_and_world_size(config)[1]
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1
    return on_node, world_size // on_node


def lanes_of(config: FitConfig) -> tuple[list[int], int]:
    """Return the indices of this process's batches within a step, and the number of all batches of a step."""
    rank, world_size = rank_and_world_size(config)
    return [rank + world_size * turn for turn in range(config.accumulate)], world_size * config.accumulate


def backend_for(device: torch.device) -> str:
    """How processes talk to each other: through gloo between hosts, and NCCL between CUDA devices."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def start_process_group(config: FitConfig, device: torch.device) -> None:
    """Start communication between the processes of a run: gloo for CPU tensors, NCCL for CUDA tensors."""
    if rank_and_world_size(config)[1] > 1 and not distributed.is_initialized():
        distributed.init_process_group(backend_for(device))
