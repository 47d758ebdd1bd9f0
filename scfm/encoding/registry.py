"""The registry of encodings: each file of this package defines a subclass of `Encoding`, which registers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from scfm._registry import Registry


class EncodingClass(Protocol):
    """Class attributes of an encoding that its settings depend on."""

    kind: str
    defaults: Mapping[str, Any]
    special_roles: tuple[str, ...]
    has_values: bool
    is_ordered: bool
    learns_medians: bool


ENCODINGS: Registry[Any] = Registry("encoding", "scfm.encoding", first=("rank", "bin", "bucket", "continuous"))
