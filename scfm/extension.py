"""Find and load the compiled libraries of the package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path


def find_library(
    name: str, load: Callable[[str], object], *, how_to_get: str = "install with a C++ compiler"
) -> tuple[Path | None, str]:
    """Load `scfm/<name>` once; the environment variable SCFM_DISABLE_EXT=1 turns all libraries off.

    Parameters
    ----------
    name
        Name of the library in `scfm`.
    load
        Function that loads the file at a path; raises OSError, ImportError or RuntimeError if it cannot.
    how_to_get
        Advice for the case that the library was not built.

    Returns
    -------
    Path of the library (None if it is not active), and the reason.
    """
    if os.environ.get("SCFM_DISABLE_EXT", "") not in ("", "0"):
        return None, "turned off by SCFM_DISABLE_EXT"
    return _find(name, load, how_to_get)


@cache
def _find(name: str, load: Callable[[str], object], how_to_get: str) -> tuple[Path | None, str]:
    spec = importlib.util.find_spec(f"scfm.{name}")
    if spec is None or spec.origin is None:
        return None, f"not built: {how_to_get}"
    try:
        load(spec.origin)
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"cannot be loaded: {error}"
    return Path(spec.origin), "loaded"
