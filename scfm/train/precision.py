"""Device and precision of a run."""

from __future__ import annotations

from typing import Any

import torch

from scfm.models.device import resolved_device
from scfm.train.config import FitConfig


def training_device(config: FitConfig) -> torch.device:
    """Return the type of device that Lightning will choose for these settings.

    Raises
    ------
    ValueError
        If the settings ask for a GPU and torch finds none.
    """
    if (
        config.accelerator in ("gpu", "cuda")
        and not torch.cuda.is_available()
        and not torch.backends.mps.is_available()
    ):
        reason = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        raise ValueError(f"`accelerator` is {config.accelerator!r}, but {reason}. Pass 'cpu', or leave it out.")
    if config.accelerator in ("gpu", "cuda") or (config.accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def own_device(config: FitConfig) -> torch.device:
    """The device of this process: under torchrun the one with the number LOCAL_RANK."""
    kind = training_device(config)
    return resolved_device("auto") if kind.type == "cuda" else kind


def resolved_precision(config: FitConfig) -> Any:
    """Return Lightning's name of the precision; "auto" is bf16-mixed on CUDA devices with bfloat16."""
    if config.precision != "auto":
        return config.precision
    if training_device(config).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    return "32-true"


def precision_plugins(config: FitConfig) -> list[Any]:
    """Return plugins for precisions that Lightning does not have by name."""
    if config.precision != "bf16-true":
        return []
    from scfm.train.plugins import Bfloat16

    return [Bfloat16()]
