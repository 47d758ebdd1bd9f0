"""Which backend serves a call."""

# Axes: T packed tokens, H heads, K head width.

from __future__ import annotations

import torch
from torch import Tensor

from scfm.ops.extension import load_extension

# Read once, at import: a graph that is being traced cannot look at the file system.
EXTENSION_PATH, EXTENSION_REASON = load_extension()

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_MAX_HEAD_DIM = 256


def choose_backend(backend: str, q: Tensor) -> str:
    """Resolve `"auto"`, and refuse what cannot be served.

    Raises
    ------
    ValueError
        If `backend` is not a known name.
    RuntimeError
        If `"fused"` is asked for where the kernels cannot serve, with the reason.
    """
    if backend not in ("auto", "fused", "torch"):
        raise ValueError(f'`backend` is {backend!r}; it must be "auto", "fused" or "torch".')
    if backend == "torch":
        return "torch"
    obstacle = _obstacle(q)
    if obstacle is None:
        return "fused"
    if backend == "fused":
        raise RuntimeError(f'`backend="fused"` cannot serve this call: {obstacle}. Pass `backend="auto"`.')
    return "torch"


def _obstacle(q: Tensor) -> str | None:
    if EXTENSION_PATH is None:
        return f"the compiled extension is {EXTENSION_REASON}"
    if q.device.type != "cpu":
        return f"there is no kernel for device {q.device.type!r}"
    if q.dtype not in FUSED_DTYPES:
        return f"there is no kernel for {q.dtype}"
    if q.shape[2] > FUSED_MAX_HEAD_DIM:
        return f"the head width is {q.shape[2]}, and the kernels go to {FUSED_MAX_HEAD_DIM}"
    return None
