"""`FitConfig`: how long, how fast, and on what a model is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """One stage of training.

    Attributes
    ----------
    n_steps
        Optimiser steps.
    tokens_per_step
        Token budget of a batch: batches are filled to a number of tokens, not of cells, so memory stays flat.
    learning_rate, weight_decay, warmup_fraction, schedule
        AdamW's peak rate and decay (matrices only); linear warm-up over a share of the steps, then the schedule to zero.
    clip_norm
        Largest norm of the gradient.
    precision
        "32-true", "bf16-mixed" or "16-mixed", as Lightning names them.
    accelerator, devices
        As Lightning's Trainer takes them.
    seed
        Of the initialisation, the order of cells, the masks and dropout.
    """

    n_steps: int = 300
    tokens_per_step: int = 8192
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_norm: float = 1.0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: int | str = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise ValueError(f"FitConfig.n_steps is {self.n_steps}; it must be at least 1.")
        if self.tokens_per_step < 1:
            raise ValueError(f"FitConfig.tokens_per_step is {self.tokens_per_step}; it must be at least 1.")
        if self.learning_rate <= 0:
            raise ValueError(f"FitConfig.learning_rate is {self.learning_rate}; it must be positive.")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"FitConfig.warmup_fraction is {self.warmup_fraction}; it must be in [0, 1).")

    def replace(self, **changes: Any) -> FitConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
