"""Choose the number of tokens of a training batch, from the memory that steps of the network need."""

# Axes: T packed tokens.

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import torch

from scfm import objectives
from scfm.data import CellBatch
from scfm.models.network import CellTransformer
from scfm.train.config import CPU_TOKENS_PER_STEP, FitConfig
from scfm.train.precision import resolved_precision
from scfm.train.trainable import recompute_blocks

logger = logging.getLogger(__name__)

PROBE_TOKENS = 2048
MEMORY_FRACTION = 0.5  # the rest is for weights, the optimizer, temporary memory of kernels, and other programs
MAX_TOKENS = 262_144  # larger batches are not processed faster


def choose_tokens_per_step(
    network: CellTransformer,
    objective: objectives.Objective,
    cells: CellBatch,
    config: FitConfig,
    *,
    device: torch.device,
) -> int:
    """Return the token budget of a batch: 8,192 on a CPU; on a GPU the largest power of two whose step fits the memory.

    On a GPU the memory of a step is measured for two numbers of tokens, with the precision and activation checkpointing of
    the run. Memory is proportional to the tokens, because attention is packed and fused. A step with the resulting budget is
    then run, and the budget is halved until the step fits. If even the measurement does not fit, 2,048 tokens are
    tried first.

    Parameters
    ----------
    network, objective
        Network to train, on the CPU, and the objective.
    cells
        Some encoded cells, on the CPU.
    config
        Settings of the run.
    device
        Device of the training.
    """
    if device.type != "cuda":
        return CPU_TOKENS_PER_STEP
    longest = int(cells.lengths_B.max())
    trial = _Trial(network, objective, cells, config, device)
    try:
        per_token = trial.bytes_per_token()
        budget = affordable_tokens(free_memory(device), per_token, longest)
    except torch.OutOfMemoryError:
        per_token, budget = math.nan, max(longest, PROBE_TOKENS)
    while budget > longest and not trial.fits(budget):
        budget = max(longest, budget // 2)
    logger.info("%s tokens per step: %.0f bytes per token", f"{budget:,}", per_token)
    return budget


def affordable_tokens(memory: int, per_token: float, longest: int) -> int:
    """Return the largest power of two of tokens that fits half of the free memory, but at least the longest cell."""
    affordable = MEMORY_FRACTION * memory / per_token
    return max(min(2 ** max(0, int(affordable).bit_length() - 1), MAX_TOKENS), longest)


class _Trial:
    """Training steps of a copy of the network on the GPU, to measure their memory."""

    def __init__(
        self,
        network: CellTransformer,
        objective: objectives.Objective,
        cells: CellBatch,
        config: FitConfig,
        device: torch.device,
    ) -> None:
        self.network = copy.deepcopy(network).to(device).train()
        if config.activation_checkpointing:
            recompute_blocks(self.network)
        self.objective, self.cells, self.device = copy.deepcopy(objective), cells, device
        own = objectives.base.weights_of(self.objective)
        parts = [self.network] if own is None else [self.network, own.to(device)]
        precision = resolved_precision(config)
        self.dtype = {"32-true": None, "16-mixed": torch.float16}.get(precision, torch.bfloat16)
        if precision == "bf16-true":
            for part in parts:
                part.bfloat16()

    def bytes_per_token(self) -> float:
        (few, few_bytes), (many, many_bytes) = self._step(PROBE_TOKENS), self._step(4 * PROBE_TOKENS)
        return max(1.0, (many_bytes - few_bytes) / max(1, many - few))

    def fits(self, n_tokens: int) -> bool:
        try:
            self._step(n_tokens)
        except torch.OutOfMemoryError:
            return False
        finally:
            self.network.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    def _step(self, n_tokens: int) -> tuple[int, int]:
        """Return the tokens and the peak memory of one step."""
        rows = np.resize(np.arange(self.cells.n_cells), 1 + n_tokens // max(1, int(self.cells.lengths_B.min())))
        within = np.cumsum(self.cells.lengths_B.numpy()[rows]) <= n_tokens
        inputs, targets = self.objective.corrupt(
            self.cells.select(rows[within] if within.any() else rows[:1]), torch.Generator().manual_seed(0)
        )
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        targets = {name: tensor.to(self.device) for name, tensor in targets.items()}
        with (
            torch.autocast("cuda", self.dtype or torch.bfloat16, enabled=self.dtype is not None),
            torch.random.fork_rng(),
        ):
            loss = objectives.total(self.objective.loss(self.network, inputs.to(self.device), targets))
        loss.backward()
        return inputs.n_tokens, torch.cuda.max_memory_allocated(self.device) - before


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a CUDA device."""
    return torch.cuda.mem_get_info(device)[0]
