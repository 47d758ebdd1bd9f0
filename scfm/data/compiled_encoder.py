"""Access to the compiled encoders in `scfm._host`; without them, encoding uses NumPy and is slower."""

from __future__ import annotations

import importlib
import threading
from types import ModuleType

import torch

from scfm.extension import find_library

_limits = threading.local()


def encoder_module() -> ModuleType | None:
    """Return the compiled module; None if it is not built, or if SCFM_DISABLE_EXT=1 turns it off."""
    path, _ = find_library("_host", _import)
    return None if path is None else importlib.import_module("scfm._host")


def encoder_threads() -> int:
    """Return the number of threads that one call may use: torch's number, or 1 after `limit_to_one_thread`."""
    return getattr(_limits, "n_threads", None) or torch.get_num_threads()


def limit_to_one_thread() -> None:
    """Let calls from the current thread use one thread only, for the threads of a pool that uses all cores already."""
    _limits.n_threads = 1


def encoder_info() -> dict[str, str | bool]:
    """Return whether the compiled encoder is active, and the reason; `scfm doctor` prints it.

    Examples
    --------
    >>> import scfm
    >>> sorted(scfm.data.encoder_info())
    ['available', 'path', 'reason']
    """
    path, reason = find_library("_host", _import)
    return {"available": path is not None, "reason": reason, "path": "" if path is None else str(path)}


def _import(_: str) -> None:
    importlib.import_module("scfm._host")
