"""Loading of the compiled kernels, and what can be said about them."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import torch

# Of the newest sources: a build without them is older than the Python code.
OPERATORS = ("attention_forward", "linear", "linear_attention_forward")
ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@cache
def load_extension() -> tuple[Path | None, str]:
    """Load `scfm/_C`, once; returns its path (None where it is not active) and the reason in words."""
    if os.environ.get("SCFM_DISABLE_EXT", "") not in ("", "0"):
        return None, "turned off by SCFM_DISABLE_EXT"
    spec = importlib.util.find_spec("scfm._C")
    if spec is None or spec.origin is None:
        return None, "not built: install with a C++ compiler (`pip install . --no-build-isolation`)"
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError) as error:
        return None, f"cannot be loaded: {error}"
    if not all(hasattr(torch.ops.scfm, name) for name in OPERATORS):
        return None, "older than the Python code: install again (`pip install . --no-build-isolation`)"
    return Path(spec.origin), "loaded"


@cache
def load_cuda_extension() -> tuple[Path | None, str]:
    """Load `scfm/_cuda`, the CUDA kernels of the same operators, once; its path or None, and the reason in words.

    It loads on machines without a GPU too: whether its kernels are used is decided call by call.
    """
    path, reason = load_extension()
    if path is None:
        return None, reason
    spec = importlib.util.find_spec("scfm._cuda")
    if spec is None or spec.origin is None:
        return None, "not built: install with nvcc and a CUDA build of torch (or with SCFM_BUILD_CUDA=1)"
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError) as error:
        return None, f"cannot be loaded: {error}"
    return Path(spec.origin), "loaded"


def extension_available() -> bool:
    return load_extension()[0] is not None


def extension_info() -> dict[str, object]:
    """What `scfm doctor` prints of the compiled kernels.

    Returns
    -------
    `available` (bool), `reason` (str), `isa` (the instruction set in use, "" without the extension), `path` (str or
    None), and `backends` (those that :func:`scfm.ops.attention` can use on this machine). `cuda_path` and `cuda_reason`
    say the same of the CUDA kernels.

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
