"""Reading and writing of a command's files: whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm._files import atomic_write

# `scfm --help` imports this module, and must not wait for pandas.
if TYPE_CHECKING:
    import pandas as pd


def read_names(path: Path) -> list[str]:
    """Read a text file with one name per line; empty lines are skipped."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(f"{path} cannot be read as a text file with one name per line: {error}") from error
    if not names:
        raise ValueError(f"{path} holds no names; write one name per line.")
    return names


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write as `.csv` or `.parquet`."""
    with atomic_write(path) as temporary_path:
        table.to_parquet(temporary_path) if path.suffix == ".parquet" else table.to_csv(temporary_path)


def tell(facts: dict[str, Any], *, as_json: bool, text: str) -> None:
    """Print a command's result on stdout: one JSON object, or words. Of the processes of torchrun, only the first prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    json.dump(facts, sys.stdout, default=str) if as_json else sys.stdout.write(text)
    sys.stdout.write("\n")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON-able rows; NaN becomes null."""
    rows: list[dict[str, Any]] = json.loads(table.reset_index().to_json(orient="records", double_precision=15))
    return rows


def inputs_and_output(paths: Sequence[str]) -> tuple[list[str], Path]:
    """Paths of a command that takes one or many inputs and then an output, as `cp` does."""
    if len(paths) < 2:
        raise ValueError(
            f"Name one or many inputs and then the output; there is only {paths[0] if paths else 'nothing'}."
        )
    return list(paths[:-1]), Path(paths[-1])
