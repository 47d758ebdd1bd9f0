"""Speed of a run: cells and tokens per second, fraction of the device's peak arithmetic, and memory in use."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from scfm.data import CellBatch
from scfm.models.network import CellTransformer

# Peak of dense bfloat16 or float16 products with float32 sums, in TFLOP/s, from the data sheets of the makers. The key is a
# part of the device name; the first key that is found in the name is used.
PEAKS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 311.8,
    "A800": 311.8,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


@dataclass(frozen=True)
class Rates:
    """Rates of a run since they were last read.

    Attributes
    ----------
    cells, tokens
        Cells and tokens per second, summed over all devices.
    peak_fraction
        Rate of operations of the products in the blocks, divided by the peak of the device; None if the peak is not known.
    memory_gb
        Maximum memory in use on the device so far, in GB; None on a CPU.
    """

    cells: float
    tokens: float
    peak_fraction: float | None = None
    memory_gb: float | None = None

    def __str__(self) -> str:
        words = [f"{self.cells:,.0f} cells/s", f"{self.tokens:,.0f} tokens/s"]
        words += [] if self.peak_fraction is None else [f"{self.peak_fraction:.0%} of peak"]
        words += [] if self.memory_gb is None else [f"{self.memory_gb:.1f} GB"]
        return ", ".join(words)

    def as_log(self) -> dict[str, float]:
        values = {
            "cells_per_second": self.cells,
            "tokens_per_second": self.tokens,
            "fraction_of_peak": self.peak_fraction,
            "memory_gb": self.memory_gb,
        }
        return {name: value for name, value in values.items() if value is not None}


class Speed(lightning.Callback):
    """Count the cells and tokens that were trained on, and log the rates."""

    def __init__(self, every: int) -> None:
        self.every = every  # steps between two log entries
        self.latest: Rates | None = None
        self._clear()

    def _clear(self) -> None:
        self.n_cells = self.n_tokens = 0
        self.flops = 0.0
        self.since = time.perf_counter()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._clear()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        inputs = batch[0]
        self.n_cells += len(inputs)
        self.n_tokens += inputs.n_tokens
        if module.device.type == "cuda":
            self.flops += block_flops(module.network, inputs)
        is_last_of_step = (batch_index + 1) % trainer.accumulate_grad_batches == 0
        if not is_last_of_step or (trainer.global_step % self.every and trainer.global_step != trainer.max_steps):
            return
        self.latest = self._rates(module.device, trainer.world_size)
        self._clear()
        if trainer.loggers:
            module.log_dict(self.latest.as_log(), batch_size=1)

    def _rates(self, device: torch.device, world_size: int) -> Rates:
        seconds = max(time.perf_counter() - self.since, 1e-9)
        cells, tokens = (count * world_size / seconds for count in (self.n_cells, self.n_tokens))
        if device.type != "cuda":
            return Rates(cells, tokens)
        peak = peak_tflops(torch.cuda.get_device_name(device))
        fraction = None if peak is None else self.flops / seconds / (peak * 1e12)
        return Rates(cells, tokens, fraction, torch.cuda.max_memory_allocated(device) / 1e9)


def peak_tflops(device_name: str) -> float | None:
    """Peak arithmetic of a device in half precision, in TFLOP/s; None if the device is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def block_flops(network: CellTransformer, inputs: CellBatch) -> float:
    """Floating-point operations of the products in all blocks, forward and backward, without recomputation.

    In the forward pass, a weight matrix needs 2 operations per element and token, and attention needs 4 x width operations
    per pair of query and key. The backward pass needs twice as many.
    """
    weights = sum(parameter.numel() for parameter in network.blocks.parameters() if parameter.dim() == 2)
    flops = 6.0 * weights * inputs.n_tokens
    plan = inputs.plan
    if plan is None or network.config.attention.kind != "softmax":
        return flops
    lengths_B = plan.cu_seqlens.diff()
    pairs = float((lengths_B * (lengths_B if plan.n_known is None else plan.n_known)).sum())
    width = network.config.n_heads * network.config.d_head
    return flops + 12.0 * width * pairs * network.config.n_layers
