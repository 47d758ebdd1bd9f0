"""Requested genes that cannot be perturbed: their reasons, and their rows in the table."""

# Axes: V tokens of the vocabulary.

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from scfm.encoding import Encoding
from scfm.perturbation.edits import Editor
from scfm.perturbation.states import States
from scfm.perturbation.variants import Perturbations, cell_of


def explain_absent(asked: Perturbations, states: States, editor: Editor, encoding: Encoding) -> dict[str, str]:
    """Return the reason for each requested perturbation that cannot be done in any cell, by name."""
    left = set() if asked.tokens is None else set(range(len(asked.tokens)))
    encoded: set[int] = set()
    for cell in range(len(states.cells)):
        if not left:
            break
        expressed = editor.expressed(cell_of(states.cells, cell))
        encoded.update(expressed.tolist())
        left -= {number for number, _ in asked.of_cell(cell, expressed, editor)}
    reasons = {}
    if left:
        assert asked.tokens is not None
        counted_V = states.n_expressing()
        for number in sorted(left):
            faults = [
                _fault(token, int(counted_V[token]), encoding) for token in asked.tokens[number] if token not in encoded
            ]
            reasons[asked.names[number]] = "; ".join(faults) or _no_cell_for(asked.names[number], asked.tokens[number])
    return reasons | dict(asked.absent)


def _fault(token: int, n_cells: int, encoding: Encoding) -> str:
    """Return the reason why no cell has a token for a gene that `n_cells` cells express."""
    name, context = encoding.vocabulary.tokens[token], encoding.config.context_length
    if not n_cells:
        return f"no cell expresses {name!r}"
    if encoding.medians is not None and np.isnan(encoding.medians[token]):
        return f"the model has no median for {name!r}, so it is never a token"
    return f"{n_cells} cells express {name!r}, but in all of them it is not among the first {context} tokens"


def _no_cell_for(name: str, tokens: tuple[int, ...]) -> str:
    if len(tokens) > 1:
        return f"no cell expresses all genes of {name!r} and another one"
    return f"the cells that express {name!r} express no other gene"


def none_or_some(absent: Mapping[str, str], n_asked: int) -> str:
    """Return the error text for perturbations that cannot be done."""
    shown = "; ".join(list(absent.values())[:5])
    end = "" if shown.endswith("?") else "."
    return f"{len(absent)} of {n_asked} perturbations cannot be done in any of these cells: {shown}{end}"


def with_absent(table: pd.DataFrame, absent: Mapping[str, str]) -> pd.DataFrame:
    """Add a column `reason`, which is empty for perturbations that were done, and rows with `n_cells` 0 for the others."""
    table = table.assign(reason="")
    if not absent:
        return table
    rows = pd.DataFrame(
        {"n_cells": 0, "null": "", "reason": list(absent.values())}, pd.Index(list(absent), name="gene")
    )
    return pd.concat([table, rows.reindex(columns=table.columns)])
