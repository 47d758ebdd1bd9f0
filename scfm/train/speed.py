"""How fast a run is: cells and tokens per second, the fraction of the device's arithmetic peak, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from scfm.data import CellBatch
from scfm.models.network import CellTransformer

# Dense peak of bfloat16 or float16 products with sums in float32, in TFLOP/s, by a part of the name of the device: data sheets
# of the makers. The first part that is found counts.
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
    """Rates of a run since they were last asked for.

    Attributes
    ----------
    cells, tokens
        Per second, over all devices.
    peak_fraction
        Of the arithmetic peak of the device that the products in the blocks make up; None if the peak is not known.
    memory_gb
        Largest memory in use on the device so far; None on a CPU.
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
    """Counts what was trained on, and logs the rates."""

    def __init__(self, every: int) -> None:
        self.every = every  # steps between two entries of the log
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
    """Arithmetic peak of a device in half precision, in TFLOP/s; None if it is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def block_flops(network: CellTransformer, inputs: CellBatch) -> float:
    """Floating-point operations of the products in all blocks, forward and backward; what is recomputed does not count.

    A matrix takes 2 operations for each of its numbers and tokens forward, and twice that backward; attention takes
    4 x width for each pair of query and key forward, and twice that backward.
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
