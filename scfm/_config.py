"""`Config`: the base class of all configuration dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import numpy as np


class Config:
    """Mixin for frozen dataclasses of JSON-able fields; a field may be a `Config` itself."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; a nested configuration can be given as a mapping of its changed fields."""
        _refuse_unknown(type(self), changes)
        nested = {
            name: value.replace(**changes[name])
            for name, value in vars(self).items()
            if isinstance(value, Config) and isinstance(changes.get(name), Mapping)
        }
        return dataclasses.replace(self, **{**changes, **nested})  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, and nested configurations as dictionaries."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build a configuration from the output of `to_dict`, also after a round trip through JSON.

        Raises
        ------
        ValueError
            If a field is unknown or missing, or its value is of another type.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{cls.__name__} needs a mapping of its fields, not {content!r}.")
        _refuse_unknown(cls, content)
        required = {
            field.name
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - content.keys()):
            raise ValueError(f"{cls.__name__} needs a value for {', '.join(missing)}.")
        hints = get_type_hints(cls)
        return cls(**{name: _converted(cls, name, value, hints[name]) for name, value in content.items()})


def require_whole(argument: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse an argument that is not a whole number, or outside its limits."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"`{argument}` is {value!r}; it must be a whole number {limits}.")


def require_seed(seed: Any) -> None:
    """Refuse a seed that NumPy or torch would not take."""
    require_whole("seed", seed, 0, 2**32 - 1)


def did_you_mean(name: str, known: list[str]) -> str:
    """Return " Did you mean ...?" with the most similar of `known`, or an empty string if none is similar."""
    similar = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {similar[0]!r}?" if similar else ""


def _refuse_unknown(cls: type, content: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in content:
        if name not in known:
            raise ValueError(
                f"{cls.__name__} has no field {name!r}.{did_you_mean(str(name), known)} Its fields: {', '.join(known)}."
            )


def _converted(cls: type, name: str, value: Any, hint: Any) -> Any:
    """Convert `value` to the type of the field: nested configurations, tuples, plain numbers."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for member in members:
        if isinstance(value, Mapping) and isinstance(member, type) and issubclass(member, Config):
            return member.from_dict(value)
        if _is_of(value, member):
            return (
                tuple(value)
                if get_origin(member) is tuple
                else value.item()
                if isinstance(value, np.generic)
                else value
            )
    raise ValueError(f"{cls.__name__}.{name} is {value!r}; it must be {' or '.join(map(_described, members))}.")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON matches a type hint. Whole numbers match float; True and False match no number."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool | np.bool_)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if origin is tuple:
        inner = get_args(hint)
        return isinstance(value, list | tuple) and (
            all(_is_of(part, inner[0]) for part in value)
            if inner[-1] is Ellipsis
            else len(value) == len(inner) and all(map(_is_of, value, inner))
        )
    return isinstance(value, origin or hint)


def _described(hint: Any) -> str:
    if hint is NoneType:
        return "None"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return getattr(hint, "__name__", str(hint))
