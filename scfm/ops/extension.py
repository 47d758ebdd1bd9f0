"""The compiled kernels: loading them, and what is known about them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from scfm.extension import find_library

# Of the newest sources: a build without them is older than the Python code.
OPERATORS = ("attention_forward", "linear", "linear_attention_forward", "cross_entropy_gradient")
ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@cache
def load_extension() -> tuple[Path | None, str]:
    """Load `scfm/_C`, once; returns its path, None if it is not active, and the reason in words."""
    path, reason = find_library(
        "_C", torch.ops.load_library, how_to_get="install with a C++ compiler (`pip install . --no-build-isolation`)"
    )
    if path is not None and not all(hasattr(torch.ops.scfm, name) for name in OPERATORS):
        return None, "older than the Python code: install again (`pip install . --no-build-isolation`)"
    return path, reason


@cache
def load_cuda_extension() -> tuple[Path | None, str]:
    """Load `scfm/_cuda`, the CUDA kernels of the same operators, once; its path or None, and the reason in words.

    It also loads on machines without a GPU: whether its kernels are used is decided call by call.
    """
    path, reason = load_extension()
    if path is None:
        return None, reason
    return find_library(
        "_cuda",
        torch.ops.load_library,
        how_to_get="install with nvcc and a CUDA build of torch (or with SCFM_BUILD_CUDA=1)",
    )


def extension_info() -> dict[str, object]:
    """Whether the compiled kernels are active, and why; `scfm doctor` prints it.

    Returns
    -------
    Dictionary of `available` (bool), `reason` (str), `isa` (the instruction set in use, "" without the extension), `path` (str
    or None), and `backends` (those that :func:`scfm.ops.attention` can use on this machine). `cuda_path` and `cuda_reason`
    are the path and the reason for the CUDA kernels.

    Examples
    --------
    >>> import scfm
    >>> info = scfm.ops.extension_info()
    >>> "torch" in info["backends"], ("fused" in info["backends"]) == info["available"]
    (True, True)
    """
    path, reason = load_extension()
    cuda_path, cuda_reason = load_cuda_extension()
    return {
        "available": path is not None,
        "reason": reason,
        "isa": "" if path is None else ISA_NAMES[torch.ops.scfm.cpu_isa()],
        "path": None if path is None else str(path),
        "backends": ("torch",) if path is None else ("fused", "torch"),
        "cuda_path": None if cuda_path is None else str(cuda_path),
        "cuda_reason": cuda_reason,
    }
