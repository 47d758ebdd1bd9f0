"""Messages of functions in the words of the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from typing import Any

_CALL = re.compile(r"`scfm\.(?:\w+\.)*(?P<name>\w+)(?:\((?P<arguments>[^`]*)\))?`")
_FIELD = re.compile(r"\b\w+Config\.(\w+)")
_KEYWORD = re.compile(r"`([a-z_]+)=`")
_VALUE = re.compile(r"(?<!\()(?<!, )`?\b([a-z_]+)=(\"[^\"]+\"|'[^']+'|True|False|\d[\d.e-]*)`?")


def as_options(text: str, *, commands: Collection[str] = (), options: Collection[str] = ()) -> str:
    """A message with its functions as commands and its arguments as options: `layer="x"` becomes --layer x.

    Parameters
    ----------
    text
        Message of a public function.
    commands
        Names of commands; a mention of the function of the same name becomes the command.
    options
        Parameters that are options of the command that failed; a mention of one in backticks becomes the option.
    """
    text = _CALL.sub(lambda call: _command(call, commands), text)
    text = _FIELD.sub(lambda field: _option(field[1]), text)
    text = _KEYWORD.sub(lambda argument: _option(argument[1]), text)
    text = _VALUE.sub(lambda argument: _option_with(argument[1], argument[2]), text)
    for name in options:
        text = text.replace(f"`{name}`", _option(name))
    return text


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option_with(name: str, value: Any) -> str:
    if value in ("True", "False"):
        return _option(name) if value == "True" else _option(f"no_{name}")
    return f"{_option(name)} {str(value).strip(chr(34) + chr(39))}"


def _command(call: re.Match[str], commands: Collection[str]) -> str:
    """The command of a function that is mentioned, with its keyword arguments as options."""
    if call["name"] not in commands:
        return call[0]
    try:
        mentioned = ast.parse(f"f({call['arguments'] or ''})", mode="eval").body
    except SyntaxError:
        return call[0]
    assert isinstance(mentioned, ast.Call)
    keywords = [(keyword.arg, ast.unparse(keyword.value)) for keyword in mentioned.keywords if keyword.arg]
    return " ".join([f"`scfm {call['name']}", *(_option_with(name, value) for name, value in keywords)]) + "`"
