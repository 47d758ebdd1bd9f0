"""The commands: each is one function in one file, which registers itself when the file is imported."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

ENTRY_POINTS = "scfm.commands"  # packages that bring commands of their own name their modules in this group

COMMANDS: dict[str, Command] = {}


@dataclass(frozen=True)
class Command:
    """A command: what `--help` says about it, and the function that runs."""

    function: Callable[..., Any]
    example: str
    options_of: str | None
    leave_out: frozenset[str]
    choices: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.function.__name__.replace("_", "-")

    @property
    def purpose(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def build(self) -> Callable[..., Any]:
        """The function with all its options. This imports the public function that the options come from."""
        from scfm.cli._options import with_options

        source = None if self.options_of is None else _named(self.options_of)
        choices = {option: tuple(_named(registry)) for option, registry in self.choices.items()}
        return with_options(self.function, source, leave_out=self.leave_out, choices=choices)


def command(
    *,
    example: str,
    options_of: str | None = None,
    leave_out: Collection[str] = (),
    choices: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the command of its name.

    Parameters
    ----------
    example
        A complete command line, shown by `--help`.
    options_of
        Dotted name of the public function whose keyword-only parameters become options, in place of the function's own
        `**options`. It is a name and not the function, so that `scfm --help` imports no function that it does not run.
    leave_out
        Parameters of that function that make no sense on a command line.
    choices
        Option to the dotted name of the registry whose names it accepts.

    Returns
    -------
    A decorator that returns the function unchanged.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        made = Command(function, example, options_of, frozenset(leave_out), choices or {})
        COMMANDS[made.name] = made
        return function

    return register


def find_commands() -> dict[str, Command]:
    """Import every file of commands, here and in installed packages, and return the registry by name."""
    package = importlib.import_module("scfm.cli")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"scfm.cli.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return dict(sorted(COMMANDS.items()))


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
