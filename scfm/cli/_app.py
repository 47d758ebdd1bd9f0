"""The application: its commands, its exit codes, and what happens when it is stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple, NoReturn

from cyclopts import App, CycloptsError

from scfm.cli._command import as_options
from scfm.errors import ScfmError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Command(NamedTuple):
    """What `--help` says of a command; its module is imported when it is run."""

    purpose: str
    usage: str
    example: str


# In the order of a first walk through them.
COMMANDS = {
    "doctor": Command(
        "Show versions, the device, and which compiled kernels are active, and why.",
        "",
        "scfm doctor",
    ),
    "check": Command(
        "Say what a model would make of a data set: counts, genes, memory, time.",
        "DATA --model MODEL",
        "scfm check new.h5ad --model pbmc_model",
    ),
    "fit": Command(
        "Train a model on raw counts; with labels, score it beside simple baselines.",
        "DATA OUTPUT [--labels-key COLUMN]",
        "scfm fit pbmc.h5ad pbmc_model --labels-key cell_type",
    ),
    "annotate": Command(
        "Give every cell the most probable of the labels that the model knows.",
        "DATA OUTPUT --model MODEL",
        "scfm annotate new.h5ad labelled.h5ad --model pbmc_model",
    ),
    "embed": Command(
        "Embed every cell of one or many files; a stopped run goes on.",
        "DATA [DATA ...] OUTPUT --model MODEL",
        "scfm embed donor1.h5ad donor2.h5ad embedded.h5ad --model pbmc_model",
    ),
    "perturb": Command(
        "Perturb genes in silico and rank them by how far the cells move.",
        "DATA TABLE --model MODEL [--genes GENE ...]",
        "scfm perturb b_cells.h5ad effects.csv --model pbmc_model --genes CD74 CST3",
    ),
    "screen": Command(
        "Estimate the effect of deleting every gene, and verify the largest exactly.",
        "DATA TABLE --model MODEL",
        "scfm screen b_cells.h5ad screen.csv --model pbmc_model",
    ),
    "tokenize": Command(
        "Encode files once, for many epochs over the same tokens.",
        "DATA [DATA ...] STORE --model MODEL",
        "scfm tokenize donor1.h5ad donor2.h5ad tokens --model pbmc_model",
    ),
    "pretrain": Command(
        "Train on files larger than memory; started again, it goes on where it was.",
        "DATA [DATA ...] RUN",
        "scfm pretrain donor1.h5ad donor2.h5ad run --preset small --n-steps 10000",
    ),
    "convert": Command(
        "Read a model in one format and write it in another.",
        "CHECKPOINT OUTPUT [--to FORMAT]",
        "scfm convert Geneformer-V1-10M my_model --vocabulary tokens.pkl --medians medians.pkl",
    ),
}


def build_app() -> App:
    app = App(
        name="scfm",
        help="Single-cell foundation models on .h5ad and .zarr files.",
        version=_version,
        help_epilogue="Exit codes: 0 done, 1 the data or the model do not serve, 2 wrong usage, 130 interrupted. "
        "SCFM_TRACEBACK=1 shows where an error came from.",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for place, (name, command) in enumerate(COMMANDS.items()):
        app.command(
            f"scfm.cli.{name}:{name}",
            name=name,
            help=command.purpose,
            usage=f"Usage: scfm {name} {command.usage}".strip() + " [OPTIONS]",
            help_epilogue=f"Example: {command.example}",
            sort_key=place,
        )
    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (by default the process's own) and exit."""
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code. Errors that a user can mend are shown without a traceback."""
    try:
        result = build_app()(list(arguments), exit_on_error=False)
    except CycloptsError:
        return EXIT_USAGE  # cyclopts has said what is wrong
    except (KeyboardInterrupt, SystemExit) as stop:
        _tell("stopped", stop)
        return EXIT_INTERRUPTED if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    except Exception as error:
        if os.environ.get("SCFM_TRACEBACK", "0") not in ("", "0"):
            raise
        _tell(_message(error), error)
        return 1
    return result if isinstance(result, int) else 0


def _tell(message: str, error: BaseException) -> None:
    """Write a message on stderr, and what the functions on the way up added to it."""
    print("\n".join([f"scfm: {message}", *getattr(error, "__notes__", [])]), file=sys.stderr)


def _message(error: Exception) -> str:
    """What a user is told: our own words, arguments named as options, and where to look for what nobody foresaw."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = as_options(text)
    if isinstance(error, (ScfmError, ValueError, LookupError, OSError)):
        return text
    return f"{text} ({type(error).__name__}; SCFM_TRACEBACK=1 shows where)"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through `finally`, so that a stopped command takes its unfinished files with it."""
    sys.exit(128 + number)


def _version() -> str:
    from importlib.metadata import version

    return version("single-cell-fm")
