"""The device of a model that is loaded."""

from __future__ import annotations

import os

import torch


def resolved_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device that is meant; for "auto" the GPU of this process if there is one, otherwise the CPU.

    Under torchrun each process has its own GPU, the one with the number LOCAL_RANK.

    Raises
    ------
    ValueError
        If a CUDA device is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_cuda else torch.device("cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not has_cuda:
        reason = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        raise ValueError(
            f"`device` is {str(device)!r}, but {reason}. Pass 'cpu', or 'auto' to use a GPU where there is one."
        )
    return chosen
