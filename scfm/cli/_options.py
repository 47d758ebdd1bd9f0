"""Options of commands, made from the signatures and docstrings of public functions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from cyclopts import Group, Parameter

from scfm.cli._messages import as_options

# What can be written on a command line; other members of a union, such as a Model next to a path, are left out.
GROUPS = {"FitConfig": "Training"}  # titles of groups of options; others have the name of their configuration
PLAIN_TYPES = (str, Path, int, float, bool, NoneType)


def with_options(
    function: Callable[..., Any],
    source: Callable[..., Any] | None,
    *,
    leave_out: Collection[str] = (),
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> Callable[..., Any]:
    """Give `function` the keyword-only parameters of `source` in place of its own `**options`.

    A parameter that is a configuration dataclass becomes one option for each field, also of dataclasses nested in it;
    the configuration is passed if any of them is given. A field with the name of another option (`seed`) follows it.

    Parameters
    ----------
    function
        A function with a numpydoc docstring.
    source
        A public function with a numpydoc docstring, from which the options, their defaults and their help are taken.
    leave_out
        Parameters of `source` that are no options.
    choices
        The only values that an option accepts, by its name.
    """
    own = [p for p in _parameters(function) if p.kind is not p.VAR_KEYWORD]
    without = {parameter.name for parameter in own} | set(leave_out)
    taken = [] if source is None else [p for p in _parameters(source) if p.kind is p.KEYWORD_ONLY]
    taken = [parameter for parameter in taken if parameter.name not in without]
    options = own + [p for p in taken if _is_option(p.annotation)]
    names = {parameter.name for parameter in options}
    hints = {} if source is None else get_type_hints(source)
    configs = [_Config(p.name, kind) for p in taken if (kind := _dataclass_in(hints[p.name]))]
    fields: dict[str, set[str]] = {}
    for config in configs:
        made = config.options(names)
        fields[config.name] = {parameter.name for parameter in made}
        names |= fields[config.name]
        options += made

    options = [_with_choices(parameter, (choices or {}).get(parameter.name)) for parameter in options]
    options = [_with_option_names(parameter, [each.name for each in options]) for parameter in options]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for config in configs:
            kwargs = config.gather(kwargs, fields[config.name])
        return function(*args, **kwargs)

    del run.__wrapped__  # the function's own signature lacks the options
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in options}
    return run


@dataclass(frozen=True)
class _Config:
    """A parameter that is a dataclass, to be spread over options."""

    name: str
    kind: type

    def fields(self) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
        hints = get_type_hints(self.kind)
        for field in dataclasses.fields(self.kind):
            yield field, hints[field.name]

    def nested(self) -> Iterator[_Config]:
        for field, hint in self.fields():
            if kind := _dataclass_in(hint):
                yield _Config(field.name, kind)

    def options(self, taken: Collection[str]) -> list[inspect.Parameter]:
        """One keyword-only parameter for each field that is not `taken`, None by default."""
        group = Group(GROUPS.get(self.kind.__name__, self.kind.__name__.removesuffix("Config")), sort_key=1)
        words = parameter_help(self.kind)
        options: list[inspect.Parameter] = []
        for field, hint in self.fields():
            if field.name in taken or not _is_option(hint) or _is_required(field):
                continue
            option = Parameter(
                help=f"{as_help(words.get(field.name, ''))}{_shown_default(field)}",
                group=group,
                negative=None if field.default is True else "",
                consume_multiple=True,
                negative_iterable="",
            )
            annotation = Annotated[_plain(hint) | None, option]  # type: ignore[valid-type]
            options.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        for config in self.nested():
            options += config.options({*taken, *(option.name for option in options)})
        return options

    def gather(self, kwargs: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
        """Replace the options of this configuration, `own`, by the configuration, if one of them was given."""
        others = {name: value for name, value in kwargs.items() if name not in own}
        if all(kwargs.get(name) is None for name in own):
            return others
        return {**others, self.name: self._build(kwargs, None)}

    def _build(self, kwargs: Mapping[str, Any], base: Any) -> Any:
        """The configuration with every field that `kwargs` name; other fields as in `base`, or by default."""
        values = {
            field.name: kwargs[field.name]
            for field, hint in self.fields()
            if _is_option(hint) and not _is_required(field) and kwargs.get(field.name) is not None
        }
        for config in self.nested():
            default = next(_default(field) for field, _ in self.fields() if field.name == config.name)
            values[config.name] = config._build(kwargs, default)
        if base is not None:
            return dataclasses.replace(base, **values)
        # `encoding: str | EncodingConfig`: the text is the one field without a default.
        required = {field.name: kwargs.get(self.name) for field, _ in self.fields() if _is_required(field)}
        return self.kind(**required, **values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown_default(field: dataclasses.Field[Any]) -> str:
    default = _default(field)
    return "" if default is None or default == () else f" [default: {default}]"


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters of `function` with types that a command line can hold, and the docstring's words as help."""
    hints, words = get_type_hints(function, include_extras=True), parameter_help(function)
    described = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            option = _described(parameter, words.get(name, ""))
            parameter = parameter.replace(annotation=Annotated[_plain(hints[name]), option])
        described.append(parameter)
    return described


def _described(parameter: inspect.Parameter, words: str) -> Parameter:
    """Help in plain text; lists take any number of values, and only switches that are on by default can be negated."""
    off_by_default = parameter.default is False
    return Parameter(
        help=as_help(words),
        consume_multiple=True,
        negative_iterable="",
        negative="" if off_by_default else None,
    )


def _with_choices(parameter: inspect.Parameter, names: tuple[str, ...] | None) -> inspect.Parameter:
    """Let a text be one of `names`."""
    if names is None:
        return parameter
    option = parameter.annotation.__metadata__[0]
    return parameter.replace(annotation=Annotated[Literal[names] | None, option])


def _with_option_names(parameter: inspect.Parameter, names: Collection[str]) -> inspect.Parameter:
    """Name other options as they are typed: `labels_key` becomes --labels-key."""
    kind, option = get_args(parameter.annotation)
    words = as_options(option.help, options=names).replace("`", "")
    return parameter.replace(annotation=Annotated[kind, Parameter.combine(option, Parameter(help=words))])


def _members(annotation: Any) -> tuple[Any, ...]:
    """Members of a union, or the one type that it is."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _dataclass_in(annotation: Any) -> type | None:
    """The configuration among the members of a union: a dataclass whose name ends in "Config"."""
    for kind in _members(annotation):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__name__.endswith("Config"):
            return kind
    return None


def _plain_members(annotation: Any) -> list[Any]:
    return [kind for kind in _members(annotation) if kind in PLAIN_TYPES or get_origin(kind) in (list, tuple, Literal)]


def _is_option(annotation: Any) -> bool:
    """Whether a value of this type can be written on a command line."""
    return bool(set(_plain_members(annotation)) - {NoneType})


def _plain(annotation: Any) -> Any:
    """The union without members that cannot be written on a command line, if anything is left."""
    return Union[tuple(_plain_members(annotation))] if _is_option(annotation) else annotation  # noqa: UP007


def parameter_help(documented: Callable[..., Any]) -> dict[str, str]:
    """Name to description of each documented parameter; of parameters described together, the first has the words."""
    parsed = docstring_parser.parse(inspect.getdoc(documented) or "", docstring_parser.DocstringStyle.NUMPYDOC)
    words = {}
    for entry in parsed.params:
        first, *others = entry.arg_name.split(", ")
        words[first] = " ".join((entry.description or "").split())
        words.update({name: f"See --{first.replace('_', '-')}." for name in others})
    return words


def as_help(text: str) -> str:
    """A description of a parameter as the help of an option: no roles, and no None, which nobody can type."""
    text = re.sub(r" Or an? :class:`[^`]*`[^.]*\.|\ba `Model`, ", "", text)  # what nobody can type either
    text = re.sub(r"\bNone( for|:| to) ", lambda found: "By default, " if found[1] == " to" else "By default: ", text)
    text = re.sub(r"([;,:] |\()By default", r"\1by default", text)
    return re.sub(r":\w+:`", "`", text)
