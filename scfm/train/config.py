"""`FitConfig`: how long, how fast, and on what a model is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Schedule = Literal["cosine", "linear", "constant"]

STAGE_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-3, "trainable": "all"}  # of pretraining


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """One stage of training.

    Attributes
    ----------
    n_steps
        Optimiser steps.
    tokens_per_step
        Token budget of a batch on each device: batches are filled to a number of tokens, not of cells, so memory stays
        flat. None measures what a token costs and takes what fits into half of the free memory.
    accumulate
        Batches whose gradients are added before a step.
    learning_rate
        Peak learning rate of AdamW. None: 1e-3 for pretraining; for fine-tuning the default of `trainable`.
    weight_decay, warmup_fraction, schedule
        AdamW's decay (matrices only); linear warm-up over a fraction of the steps, then the schedule to 0.
    clip_norm
        Largest norm of the gradient.
    precision
        "32-true", "bf16-mixed" or "16-mixed", as Lightning names them.
    accelerator, devices, n_nodes, strategy
        As Lightning's Trainer takes them; start several processes with torchrun. "ddp": each device holds the whole model;
        "fsdp": a shard of it (CUDA only).
    trainable
        "all", "head", "last:N" (head and the last N blocks), or "lora:R" (head, and low-rank updates of rank R). None:
        "all" for pretraining; for fine-tuning `scfm.fit` chooses by the size of the model.
    activation_checkpointing
        Recompute each block in the backward pass instead of keeping its activations: less memory, a third more time.
    validate_every, patience
        Steps between validations where validation cells are given, and validations without improvement after which
        training stops; the best weights are kept. None for patience never stops early.
    checkpoint_every
        Steps between checkpoints where a run folder is given.
    seed
        Of the initialisation, the order of cells, the masks and dropout.

    Examples
    --------
    >>> import scfm
    >>> config = scfm.FitConfig(n_steps=50, trainable="lora:4")
    >>> config.replace(learning_rate=3e-4).n_steps
    50
    >>> scfm.FitConfig(schedule="step")
    Traceback (most recent call last):
        ...
    ValueError: FitConfig.schedule is 'step'; choose one of cosine, linear, constant.
    """

    n_steps: int = 300
    tokens_per_step: int | None = 8192
    accumulate: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    schedule: Schedule = "cosine"
    clip_norm: float = 1.0
    precision: Precision = "32-true"
    accelerator: str = "auto"
    devices: int | str = 1
    n_nodes: int = 1
    strategy: str = "auto"
    trainable: str | None = None
    activation_checkpointing: bool = False
    validate_every: int = 50
    patience: int | None = None
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_steps", "accumulate", "n_nodes", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"FitConfig.tokens_per_step is {self.tokens_per_step}; it must be at least 1, or None.")
        if self.learning_rate is not None and not self.learning_rate > 0:  # NaN is not either
            raise ValueError(f"FitConfig.learning_rate is {self.learning_rate}; it must be positive.")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"FitConfig.warmup_fraction is {self.warmup_fraction}; it must be in [0, 1).")
        for name, allowed in (("precision", get_args(Precision)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")

    @classmethod
    def for_cells(cls, n_cells: int, *, seed: int = 0) -> FitConfig:
        """Return settings for a number of cells: steps grow with its square root, 53 for 700 and 2,000 for a million."""
        return cls(n_steps=int(min(max(2 * n_cells**0.5, 30), 4000)), seed=seed)

    def with_defaults(self, **defaults: Any) -> FitConfig:
        """Fill in the fields that are None, such as the learning rate that suits a stage."""
        return self.replace(**{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def replace(self, **changes: Any) -> FitConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitConfig:
        """Build from `to_dict`'s output; an unknown field is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"FitConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        return cls(**values)
