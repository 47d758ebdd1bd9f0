"""What commands that rank genes share: cells and a model in, a table out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import pandas as pd

import scfm
from scfm._output import require_writable
from scfm.cli import _files
from scfm.models import Model

SUFFIXES = (".csv", ".parquet")
SHOWN_ROWS = 10

Ranking = Callable[[anndata.AnnData, Model], pd.DataFrame]


def rank_genes(ranking: Ranking, source: Path, target: Path, *, model: Path, as_json: bool) -> None:
    """Apply `ranking` to the cells of `source`, write its table to `target`, and tell the first rows."""
    require_writable(target, SUFFIXES)
    effects = ranking(_files.read(source), scfm.load(model))
    _files.write_table(effects, target)
    top = effects.head(SHOWN_ROWS)
    facts = {"output": target, "n_genes": len(effects), "top": _files.records(top)}
    _files.tell(facts, as_json=as_json, text=f"{top.to_string(float_format='{:.3g}'.format)}\nwritten to {target}")
