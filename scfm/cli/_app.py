"""The application: its commands, its exit codes, and what happens when it is stopped."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError

from scfm.cli._messages import as_options
from scfm.cli._registry import COMMANDS, find_commands
from scfm.errors import ScfmError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def build_app(selected: str | None = None) -> App:
    """The application; with `selected`, only that command has its options, because making them imports what it calls."""
    app = App(
        name="scfm",
        help="Single-cell foundation models on .h5ad and .zarr files.",
        version=_version,
        help_epilogue="Exit codes: 0 done, 1 the data or the model cannot be used, 2 wrong usage, 130 interrupted. "
        "SCFM_TRACEBACK=1 shows where an error came from.",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, command in find_commands().items():
        app.command(
            command.build() if selected in (None, name) else command.function,
            name=name,
            help=command.purpose,
            help_epilogue=f"Example: {command.example}",
        )
    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (by default the process's own) and exit."""
    signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a label may not fit its encoding
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code. Errors that a user can fix are shown without a traceback."""
    name = arguments[0] if arguments else ""
    try:
        result = build_app(name)(list(arguments), exit_on_error=False)
    except CycloptsError:
        return EXIT_USAGE  # cyclopts has said what is wrong
    except (KeyboardInterrupt, SystemExit) as stop:
        _tell("stopped", stop)
        return EXIT_INTERRUPTED if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    except Exception as error:
        if os.environ.get("SCFM_TRACEBACK", "0") not in ("", "0"):
            raise
        _tell(_message(error, name), error)
        return 1
    return result if isinstance(result, int) else 0


def _tell(message: str, error: BaseException) -> None:
    """Write a message on stderr, and what the functions on the way up added to it."""
    print("\n".join([f"scfm: {message}", *getattr(error, "__notes__", [])]), file=sys.stderr)


def _message(error: Exception, name: str) -> str:
    """Our own words, with arguments named as options; an error that was not foreseen says where to look."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    command = COMMANDS.get(name)
    options = inspect.signature(command.build()).parameters if command else ()
    text = as_options(text, commands=COMMANDS, options=options)
    if isinstance(error, (ScfmError, ValueError, LookupError, OSError)):
        return text
    return f"{text} ({type(error).__name__}; SCFM_TRACEBACK=1 shows where)"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through `finally`, so that a stopped command takes its unfinished files with it."""
    sys.exit(128 + number)


def _version() -> str:
    from importlib.metadata import version

    return version("single-cell-fm")
