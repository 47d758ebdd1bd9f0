"""Commands made from public functions, so that an option and its help are declared once, there."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import docstring_parser
from cyclopts import Group, Parameter

_AS_IN = re.compile(r"As in `(?P<function>scfm[\w.]+)`")


def command_of(
    function: Callable[..., Any], *, leave_out: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give the decorated command the keyword-only parameters of `function` in place of its own `**options`.

    A parameter that is a configuration dataclass becomes one option a field; the configuration is passed when any of
    them is given. A field that has the name of another option (`seed`) follows that option.

    Parameters
    ----------
    function
        A public function with a numpydoc docstring, which help and defaults are taken from.
    leave_out
        Parameters that make no sense on a command line.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in _parameters(command) if p.kind is not p.VAR_KEYWORD]
        without = {parameter.name for parameter in own} | set(leave_out)
        taken = [p for p in _parameters(function) if p.kind is p.KEYWORD_ONLY and p.name not in without]
        configs = [_Config.of(p) for p in taken if _dataclass_in(p.annotation)]
        options = own + [p for p in taken if not _dataclass_in(p.annotation)]
        named = {p.name for p in options}
        fields = {config.name: config.options(named) for config in configs}
        every = [*options, *(field for some in fields.values() for field in some)]

        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> Any:
            for config in configs:
                kwargs = config.gather(kwargs, {field.name for field in fields[config.name]})
            return command(*args, **kwargs)

        del run.__wrapped__  # the command's own signature lacks the options
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return run

    return decorate


@dataclass(frozen=True)
class _Config:
    """A parameter that is a dataclass, to be spread over options."""

    name: str
    kind: type

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> _Config:
        kind = _dataclass_in(parameter.annotation)
        assert kind is not None
        return cls(parameter.name, kind)

    def options(self, taken: Collection[str]) -> list[inspect.Parameter]:
        """One keyword-only parameter for each field that is not `taken`, None by default."""
        group = Group(f"{self.kind.__name__} (where none is given, the function's own choice)", sort_key=1)
        hints, words = get_type_hints(self.kind), parameter_help(self.kind)
        options = []
        for field in dataclasses.fields(self.kind):
            if field.name in taken or _dataclass_in(hints[field.name]):
                continue
            text = f"{words.get(field.name, '')} [default: {field.default}]"
            annotation = _optional(hints[field.name], Parameter(help=text, group=group, negative=""))
            options.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        return options

    def gather(self, kwargs: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
        """Replace the options of this configuration by the configuration, if any was given."""
        given = {name: value for name, value in kwargs.items() if name in names and value is not None}
        others = {name: value for name, value in kwargs.items() if name not in names}
        if not given:
            return others
        shared = {field.name for field in dataclasses.fields(self.kind)} & others.keys()
        return {**others, self.name: self.kind(**given, **{name: others[name] for name in shared})}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters of `function` with resolved types and the docstring's words as help."""
    hints, words = get_type_hints(function, include_extras=True), parameter_help(function)
    return [
        parameter
        if parameter.kind is parameter.VAR_KEYWORD
        else parameter.replace(annotation=Annotated[hints[name], _described(parameter, words.get(name, ""))])
        for name, parameter in inspect.signature(function).parameters.items()
    ]


def _described(parameter: inspect.Parameter, words: str) -> Parameter:
    """Help in plain text; lists take any number of values, and only switches that are on by default can be negated."""
    off_by_default = parameter.default is False
    return Parameter(
        help=words.replace("`", ""),
        consume_multiple=True,
        negative_iterable="",
        negative="" if off_by_default else None,
    )


def _optional(kind: Any, option: Parameter) -> Any:
    return Annotated[kind | None, option]


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass in `Annotated[X | None, ...]`, if X is one."""
    if get_origin(annotation) is Annotated:
        return _dataclass_in(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next((kind for kind in map(_dataclass_in, get_args(annotation)) if kind), None)
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def parameter_help(documented: Callable[..., Any]) -> dict[str, str]:
    """Name to description of each documented parameter.

    "As in `scfm.tl.embed`" is replaced by what stands there; of parameters described together, the first has the words.
    """
    parsed = docstring_parser.parse(inspect.getdoc(documented) or "", docstring_parser.DocstringStyle.NUMPYDOC)
    words = {}
    for entry in parsed.params:
        description = " ".join((entry.description or "").split())
        reference = _AS_IN.match(description)
        first, *others = entry.arg_name.split(", ")
        for name in (first, *others):
            if reference:
                words[name] = parameter_help(_named(reference["function"])).get(name, "")
            else:
                words[name] = description if name == first else f"See --{first.replace('_', '-')}."
    return words


def as_options(text: str) -> str:
    """Words of a function, with its arguments as they are written on a command line: `layer="x"` as --layer x."""
    text = re.sub(r"`([a-z_]+)=`", lambda argument: f"`--{argument[1].replace('_', '-')}`", text)
    return re.sub(r'\blayer="([^"]+)"', r"--layer \1", text)


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
