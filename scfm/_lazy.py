"""Import what a package offers at its first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def at_first_use(package: dict[str, Any], modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that imports the module of each name when it is first used.

    Parameters
    ----------
    package
        `globals()` of the package, in which the value is kept.
    modules
        Import name of the module that defines each name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        package[name] = value = getattr(importlib.import_module(modules[name]), name)
        return value

    return get
