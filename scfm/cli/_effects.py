"""What commands that rank genes share: cells and a model in, a table out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scfm
from scfm._files import require_writable
from scfm.cli import _files

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")
SHOWN_ROWS = 10


def rank_genes(
    ranking: Callable[..., pd.DataFrame],
    paths: Sequence[str],
    *,
    model: Path,
    as_json: bool,
    device: str,
    **options: Any,
) -> None:
    """Apply `ranking` to the cells of all `paths` but the last, write its table to the last, and print the first rows."""
    sources, table = _files.inputs_and_output(paths)
    require_writable(table, SUFFIXES)
    effects = ranking(sources, scfm.load(model, device=device), **options)
    _files.write_table(effects, table)
    top = effects.head(SHOWN_ROWS)
    facts = {"output": table, "n_genes": len(effects), "top": _files.records(top)}
    _files.tell(facts, as_json=as_json, text=f"{top.to_string(float_format='{:.3g}'.format)}\nwritten to {table}")
