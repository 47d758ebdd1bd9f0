"""`FitConfig`: how long, how fast, and on what a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from scfm._config import Config

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"]
Schedule = Literal["cosine", "linear", "constant"]

# Of a stage that is not told otherwise; `scfm.pretrain` and fine-tuning have defaults of their own.
STAGE_DEFAULTS: dict[str, Any] = {
    "n_steps": 300,
    "learning_rate": 1e-3,
    "embedding_learning_rate_scale": 1.0,
    "trainable": "all",
    "seed": 0,
}
CPU_TOKENS_PER_STEP = 8192
# Fields that say on what a model is trained; one machine serves both stages of a fit.
MACHINE = ("tokens_per_step", "precision", "accelerator", "devices", "n_nodes", "strategy", "compile")


@dataclass(frozen=True, kw_only=True)
class FitConfig(Config):
    """Settings of one stage of training.

    Attributes
    ----------
    n_steps
        Number of optimizer steps. None: `scfm.fit` and `scfm.pretrain` choose it by the number of cells; other functions have
        a fixed number.
    tokens_per_step
        Maximum number of tokens of a batch on each device, so that all batches need about the same memory. None for 8,192 on
        a CPU; on a GPU, the memory per token is measured, and the batch uses half of the free memory. By
        default, a batch of `scfm.fit` with labels has about 16 cells in pretraining and 32 in fine-tuning.
    accumulate
        Number of batches per step on each device (gradient accumulation). The loss of a step is the mean over all batches of
        all devices, so 2 devices with 1 batch each compute the same as 1 device with 2.
    learning_rate
        Peak learning rate of AdamW. None: 1e-3; in `scfm.pretrain` 3e-4; in the fine-tuning of `scfm.fit` 1e-4 for
        `trainable` "all" and "last:N", 5e-4 for "lora:R" and 1e-3 for "head"; in `scfm.tl.classify_genes` 2e-4, and 5e-4
        for models of more than 20 million parameters.
    embedding_learning_rate_scale
        Factor of the learning rate of the gene embedding, and of weights that only the objective has (the decoder of "profile");
        with 0 they are not trained. None for 1, and in `scfm.pretrain` 0.1 if the embedding is initialized by a
        decomposition or a model; 5 for the objective "profile".
    weight_decay
        Weight decay of AdamW, for matrices only.
    warmup_fraction
        Fraction of the steps in which the learning rate increases linearly to its peak.
    schedule
        Schedule of the learning rate after the warm-up: "cosine" or "linear" to 0, or "constant".
    clip_norm
        Maximum norm of the gradient.
    precision
        "32-true", "bf16-mixed", "16-mixed" or "bf16-true" (weights in bfloat16 too), the names of Lightning. "auto" for
        bf16-mixed on a CUDA device with bfloat16, otherwise 32-true, with TF32 on CUDA devices.
    accelerator
        "cpu", "gpu", "mps" or "auto", as in `lightning.Trainer`.
    devices
        Number of processes per node. "auto" for as many as torchrun has started, or one.
    n_nodes
        Number of nodes.
    strategy
        "ddp": each device holds the complete model; "fsdp": a shard of it, and its checkpoints are directories of shards.
        "auto": ddp for several processes.
    trainable
        "all", "head", "last:N" (head and the last N blocks), or "lora:R" (head, and low-rank updates of rank R). None:
        "all" for pretraining; for fine-tuning `scfm.fit` chooses by the size of the model and the number of labels.
    activation_checkpointing
        Whether to recompute each block in the backward pass instead of keeping its activations, which needs less memory and
        about a third more time.
    compile
        Whether to compile the blocks with torch.compile, for batches of any shape. Needs a C++ compiler; meant for GPUs.
    validate_every
        Number of steps between validations, if there are validation cells. None for 20 validations in a run.
    patience
        Number of validations without improvement after which training stops. None to never stop early. The weights with the
        lowest validation loss are kept in both cases.
    checkpoint_every
        Number of steps between checkpoints, if there is a run folder.
    checkpoint_minutes
        Number of minutes after which a checkpoint is also written. None for no such checkpoints.
    seed
        Seed of the order of cells, masks and dropout. None: the `seed` of the function that trains.

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

    n_steps: int | None = None
    tokens_per_step: int | None = None
    accumulate: int = 1
    learning_rate: float | None = None
    embedding_learning_rate_scale: float | None = None
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    schedule: Schedule = "cosine"
    clip_norm: float = 1.0
    precision: Precision = "auto"
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    n_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    trainable: str | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    validate_every: int | None = None
    patience: int | None = None
    checkpoint_every: int = 100
    checkpoint_minutes: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "n_nodes", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("n_steps", "tokens_per_step", "validate_every", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)}; it must be at least 1, or None.")
        for name in ("learning_rate", "checkpoint_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:  # NaN is refused too
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)}; it must be positive.")
        if self.embedding_learning_rate_scale is not None and not self.embedding_learning_rate_scale >= 0:
            raise ValueError(
                f"FitConfig.embedding_learning_rate_scale is {self.embedding_learning_rate_scale}; it must be at least 0."
            )
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"FitConfig.warmup_fraction is {self.warmup_fraction}; it must be in [0, 1).")
        if self.devices != "auto" and (not isinstance(self.devices, int) or self.devices < 1):
            raise ValueError(f"FitConfig.devices is {self.devices!r}; it must be at least 1, or 'auto'.")
        choices = (("precision", Precision), ("schedule", Schedule))
        for name, allowed in (*((n, get_args(t)) for n, t in choices), ("strategy", ("auto", "ddp", "fsdp"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        if self.trainable is not None:
            kind_and_number(self.trainable)

    @classmethod
    def for_cells(cls, n_cells: int, *, seed: int | None = None) -> FitConfig:
        """Return settings for a number of cells.

        The number of steps is twice the square root of the number of cells, rounded down, at least 30 and at most 4,000: 52
        for 700 cells, 2,000 for a million.
        """
        return cls(n_steps=int(min(max(2 * n_cells**0.5, 30), 4000)), seed=seed)

    @property
    def steps_between_validations(self) -> int:
        return self.validate_every or max(1, (self.n_steps or 0) // 20)

    def machine_only(self) -> FitConfig:
        """Return the settings of the machine (devices, precision, memory), with defaults for all others."""
        return FitConfig(**{name: getattr(self, name) for name in MACHINE})

    def with_defaults(self, **defaults: Any) -> FitConfig:
        """Fill in the fields that are None, such as the learning rate that suits a stage."""
        return self.replace(**{name: value for name, value in defaults.items() if getattr(self, name) is None})


def kind_and_number(trainable: str) -> tuple[str, int]:
    """Split `trainable`, such as "lora:8", into "lora" and 8; the number of "all" and "head" is 0.

    Raises
    ------
    ValueError
        If it is none of "all", "head", "last:N" and "lora:R".
    """
    kind, _, number = trainable.partition(":")
    if kind not in ("all", "head", "last", "lora") or (kind in ("last", "lora")) != number.isdigit():
        raise ValueError(f"`trainable` is {trainable!r}; choose 'all', 'head', 'last:N' (blocks) or 'lora:R' (rank).")
    return kind, int(number or 0)
