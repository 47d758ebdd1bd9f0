"""Which backend serves a call."""

# Axes: T packed tokens, H heads, K head width.

from __future__ import annotations

import torch
from torch import Tensor

from scfm.ops.extension import load_extension

# Read once, at import: a graph that is being traced cannot look at the file system.
EXTENSION_PATH, EXTENSION_REASON = load_extension()

# "auto" takes the fused kernels wherever they can serve. Speed over plain torch on one core with the same instruction set
# (cells of 300 and 700 tokens, head width 64; forward, forward + backward):
#
#                 float32                       bfloat16                      float16
#                 plain        generative      plain        generative      plain        generative
# portable        1.29, 1.67   2.03, 1.86      1.48, 1.84   2.15, 2.00      1.78, 1.78   2.11, 1.80
# avx2            1.21, 2.13   2.29, 2.49      1.45, 2.37   2.51, 2.44      1.24, 3.21   2.14, 2.36
# avx512          1.47, 3.11   2.85, 3.05      0.93, 3.43   3.06, 3.59      1.43, 2.98   2.82, 2.72
# amx             (float as avx512)            1.77, 8.72   5.53, 8.40
#
# and at head widths 32, 128 and 256, plain: float32 1.34 to 1.47 forward, bfloat16 (amx) 1.81 to 1.86.
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
