"""The application: its commands, its exit codes, and what happens when it is stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError

from scfm.errors import ScfmError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Name to what it does and an example; a command's module is imported when the command is run.
COMMANDS = {
    "doctor": ("Show versions, the device, and which compiled kernels are active, and why.", "scfm doctor"),
    "check": (
        "Say what a model would make of a data set: counts, genes, memory, time.",
        "scfm check new.h5ad --model pbmc_model",
    ),
    "fit": (
        "Train a model on raw counts; with labels, score it beside simple baselines.",
        "scfm fit pbmc.h5ad pbmc_model --labels-key cell_type",
    ),
    "tokenize": (
        "Encode files once, for many epochs over the same tokens.",
        "scfm tokenize donor1.h5ad donor2.h5ad tokens --model pbmc_model",
    ),
    "pretrain": (
        "Train on files larger than memory; started again, it goes on where it was.",
        "scfm pretrain donor1.h5ad donor2.h5ad run --preset small --n-steps 10000",
    ),
    "embed": (
        "Embed every cell of one or many files; a stopped run goes on.",
        "scfm embed donor1.h5ad donor2.h5ad embedded.h5ad --model pbmc_model",
    ),
    "annotate": (
        "Give every cell the most probable of the labels that the model knows.",
        "scfm annotate new.h5ad labelled.h5ad --model pbmc_model",
    ),
    "perturb": (
        "Perturb genes in silico and rank them by how far the cells move.",
        "scfm perturb b_cells.h5ad effects.csv --model pbmc_model --genes CD74 CST3",
    ),
    "screen": (
        "Estimate the effect of deleting every gene, and verify the largest exactly.",
        "scfm screen b_cells.h5ad screen.csv --model pbmc_model",
    ),
    "convert": (
        "Read a model in one format and write it in another.",
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
    for name, (purpose, example) in COMMANDS.items():
        app.command(f"scfm.cli.{name}:{name}", name=name, help=purpose, help_epilogue=f"Example: {example}")
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
    except KeyboardInterrupt:
        print("scfm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ScfmError, ValueError, KeyError, OSError) as error:
        if os.environ.get("SCFM_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"scfm: {_message(error)}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def _message(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through `finally`, so that a stopped command takes its unfinished files with it."""
    sys.exit(128 + number)


def _version() -> str:
    from importlib.metadata import version

    return version("single-cell-fm")
