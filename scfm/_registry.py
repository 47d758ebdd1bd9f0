"""`Registry`: objects of one kind by name, each added by the file that defines it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name: first those named in `first`, in that order, then the others in alphabetical order.

    Before the first look-up, every file of `package` whose name has no leading underscore is imported. A new entry is
    therefore one file that calls `add`. Code outside of the package may add entries too.

    Parameters
    ----------
    kind
        What an entry is, for error messages.
    package
        Import name of the package whose files add entries.
    first
        Names of entries that come before all others.
    """

    def __init__(self, kind: str, package: str, *, first: tuple[str, ...] = ()) -> None:
        self.kind, self._package = kind, package
        self._place_of = {name: place for place, name in enumerate(first)}
        self._entries: dict[str, T] = {}
        self._is_complete = False

    def add(self, name: str, entry: T) -> T:
        """Add `entry` under `name` and return it.

        Raises
        ------
        ValueError
            If another entry has this name.
        """
        if self._entries.get(name, entry) is not entry:
            raise ValueError(f"A {self.kind} with the name {name!r} is already registered; choose another name.")
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Remove an entry, for example after a test."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        self._complete()
        if name not in self._entries:
            raise KeyError(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._complete()
        return iter(sorted(self._entries, key=lambda name: (self._place_of.get(name, len(self._place_of)), name)))

    def __len__(self) -> int:
        self._complete()
        return len(self._entries)

    def _complete(self) -> None:
        if self._is_complete:
            return
        self._is_complete = True  # before the imports, because the imported files may look up entries
        for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")
