"""The compiled encoder `scfm._host`; everything works without it, more slowly."""

from __future__ import annotations

import importlib
import threading
from types import ModuleType

import torch

from scfm.extension import find_library

_here = threading.local()


def host_module() -> ModuleType | None:
    """Return the compiled module; None if it was not built, or if SCFM_DISABLE_EXT=1 turns it off."""
    path, _ = find_library("_host", _import)
    return None if path is None else importlib.import_module("scfm._host")


def host_threads() -> int:
    """Threads that one call of the compiled module may use: torch's number, or one in a thread of a pool."""
    return getattr(_here, "n_threads", None) or torch.get_num_threads()


def keep_to_one_thread() -> None:
    """Let calls from this thread use no other: for the threads of a pool that fills the cores by itself."""
    _here.n_threads = 1


def host_info() -> dict[str, str | bool]:
    """Whether the compiled encoder is active, and why; `scfm doctor` prints it.

    Examples
    --------
    >>> import scfm
    >>> sorted(scfm.data.host_info())
    ['available', 'path', 'reason']
    """
    path, reason = find_library("_host", _import)
    return {"available": path is not None, "reason": reason, "path": "" if path is None else str(path)}


def _import(_: str) -> None:
    importlib.import_module("scfm._host")
