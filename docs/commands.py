"""The reference of the command line, from the registry of commands: `docs/conf.py` writes it to `_commands.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from scfm.cli._registry import Command, find_commands


def page() -> str:
    """All commands, each with its example and its options, as Markdown."""
    return "\n\n".join("\n".join(_section(command)) for command in find_commands().values()) + "\n"


def _section(command: Command) -> Iterator[str]:
    yield from (f"### `scfm {command.name}`", "", command.purpose, "", "```bash", command.example, "```", "")
    yield from ("| argument | description | default |", "| --- | --- | --- |")
    for parameter in inspect.signature(command.build()).parameters.values():
        option = parameter.annotation.__metadata__[0]
        words, _, default = option.help.partition(" [default: ")
        if not default and parameter.default not in (None, False, parameter.empty):
            default = str(parameter.default)
        yield f"| {_name(parameter)} | {_escaped(words)} | {_escaped(default.rstrip(']'))} |"


def _name(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.KEYWORD_ONLY:
        required = " (required)" if parameter.default is parameter.empty else ""
        return f"`--{parameter.name.replace('_', '-')}`{required}"
    return f"`{parameter.name.upper()}`"


def _escaped(text: str) -> str:
    """Text in a cell of a table: no bar, and no character that Markdown would read as markup."""
    for character in "\\|<>*_":
        text = text.replace(character, f"\\{character}")
    return text.replace("--", r"\-\-")  # not a dash
