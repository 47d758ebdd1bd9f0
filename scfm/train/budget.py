"""How many tokens a training step may hold: measured on the network itself, before the first step."""

# Axes: T packed tokens.

from __future__ import annotations

import logging

import torch
from torch import Tensor

from scfm import objectives
from scfm.data import CellBatch, TokenBudgetSampler
from scfm.models.network import CellTransformer
from scfm.train.config import FitConfig

logger = logging.getLogger(__name__)

PROBE_TOKENS = 2048
SHARE_OF_MEMORY = 0.5  # the rest is for weights, the optimiser, temporaries of kernels, and other programs
MOST_TOKENS = {"cpu": 16_384, "cuda": 262_144}  # above these a step only gets rarer, not faster


def choose_tokens_per_step(
    network: CellTransformer,
    objective: objectives.Objective,
    cells: CellBatch,
    *,
    device: torch.device,
    memory: int | None = None,
) -> int:
    """Largest power-of-two token budget whose activations fit into half of the free memory of a device.

    The bytes that a step keeps for its backward pass are counted on a small batch. With the packed, fused attention
    they grow in proportion to the tokens, so one measurement serves, and no search has to run into the end of memory.

    Parameters
    ----------
    network, objective
        What will be trained.
    cells
        Some encoded cells, on the host.
    device
        Where training will run; the measurement runs where the network is now.
    memory
        Bytes free on the device; None to ask it.
    """
    memory = free_memory(device) if memory is None else memory
    rows = next(iter(TokenBudgetSampler(cells.lengths_B.numpy(), max_tokens=PROBE_TOKENS)))
    batch = cells.select(rows)
    per_token = saved_bytes(network, objective, batch) / max(1, batch.n_tokens)
    affordable = SHARE_OF_MEMORY * memory / per_token
    longest = int(cells.lengths_B.max())
    budget = 2 ** max(0, int(affordable).bit_length() - 1)
    budget = max(min(budget, MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])), longest)
    logger.info("%s tokens a step: %.0f bytes a token, %.1f GB free", f"{budget:,}", per_token, memory / 1e9)
    return budget


def saved_bytes(network: CellTransformer, objective: objectives.Objective, cells: CellBatch) -> int:
    """Bytes that one forward pass keeps for its backward pass, weights not counted; every storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = network.embedding.gene.weight.device
    inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    targets = {name: tensor.to(device) for name, tensor in targets.items()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.random.fork_rng():
        loss = objectives.total(objective.loss(network, inputs.to(device), targets))
    del loss
    return sum(kept.values())


def training_device(config: FitConfig) -> torch.device:
    """Kind of device that Lightning will choose for these settings."""
    if config.accelerator in ("gpu", "cuda") or (config.accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; for the CPU, what the system says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:  # noqa: PTH123 - a kernel interface, not a file of the user
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return 8 * 10**9  # not Linux: a modest laptop
