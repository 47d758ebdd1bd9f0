"""Finds the compiled host encoder `scfm._host`; everything works without it, more slowly."""

from __future__ import annotations

import importlib
import os
import threading
from functools import cache
from types import ModuleType

import torch

_here = threading.local()


def host_module() -> ModuleType | None:
    """Return the compiled module; None where it was not built, or SCFM_DISABLE_EXT=1 turns it off."""
    if os.environ.get("SCFM_DISABLE_EXT", "0") not in ("", "0"):
        return None
    return _load()[0]


def host_threads() -> int:
    """Threads that one call of the compiled module may use: torch's number, or one where the caller is one of many."""
    return getattr(_here, "n_threads", None) or torch.get_num_threads()


def keep_to_one_thread() -> None:
    """Let calls from this thread use no other: for the threads of a pool that fills the cores by itself."""
    _here.n_threads = 1


def host_info() -> dict[str, str | bool]:
    """Say whether the compiled encoder is active, and why not where it is not (for `scfm doctor`).

    Examples
    --------
    >>> import scfm
    >>> sorted(scfm.data.host_info())
    ['available', 'path', 'reason']
    """
    if host_module() is not None:
        return {"available": True, "reason": "built and loaded", "path": str(_load()[0].__file__)}  # type: ignore[union-attr]
    if os.environ.get("SCFM_DISABLE_EXT", "0") not in ("", "0"):
        return {"available": False, "reason": "SCFM_DISABLE_EXT is set", "path": ""}
    return {"available": False, "reason": _load()[1], "path": ""}


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("scfm._host"), ""
    except ImportError as error:
        return None, f"scfm._host could not be imported ({error})"
