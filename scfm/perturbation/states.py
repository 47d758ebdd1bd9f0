"""The cells to perturb, and the state that they should approach."""

# Axes: B cells, D model width.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import anndata
import numpy as np
from numpy.typing import NDArray

from scfm import pp
from scfm._config import did_you_mean
from scfm.data import CellBatch
from scfm.data.columns import groups
from scfm.errors import LabelsError
from scfm.models.model import Model, Precision
from scfm.pp._encode import require_cells


@dataclass(frozen=True)
class States:
    """Cells to perturb, and the state that they should approach.

    Attributes
    ----------
    cells
        The cells of the start state, encoded.
    original_BD
        Their embeddings.
    goal_D
        Mean embedding of the goal state's cells; None without a goal.
    n_expressing
        Counts the cells that express each gene, by token id; genes beyond the context too.
    """

    cells: CellBatch
    original_BD: NDArray[np.float32]
    goal_D: NDArray[np.float64] | None
    n_expressing: Callable[[], NDArray[np.int64]]


def read_states(
    adata: anndata.AnnData,
    model: Model,
    *,
    groupby: str | None,
    start: str | None,
    goal: str | None,
    layer: str | None,
    gene_key: str | None,
    precision: Precision = "fp32",
) -> States:
    """Encode and embed the start cells, and the mean of the goal cells.

    Without `start`, all cells but those of the goal are perturbed; without `groupby`, all cells.
    """
    require_cells(adata)
    group_B = _groups(adata, groupby, {"start": start, "goal": goal})
    chosen = np.ones(adata.n_obs, dtype=bool)
    if group_B is not None and start is not None:
        chosen = group_B == start
    elif group_B is not None and goal is not None:
        chosen = group_B != goal
    if not chosen.any():
        raise LabelsError(f"All cells are of the goal state {goal!r}; there are none to start from.")
    cells = pp.encode(adata[chosen], model.encoding, layer=layer, gene_key=gene_key)
    goal_D = None
    if group_B is not None and goal is not None:
        goal_cells = pp.encode(adata[group_B == goal], model.encoding, layer=layer, gene_key=gene_key)
        goal_D = model.embed(goal_cells, precision=precision).mean(0, dtype=np.float64)

    def n_expressing() -> NDArray[np.int64]:
        expression_BV = pp.log_expression(adata[chosen], model.encoding, layer=layer, gene_key=gene_key)
        return np.bincount(expression_BV.indices, minlength=expression_BV.shape[1])

    return States(cells, model.embed(cells, precision=precision), goal_D, n_expressing)


def _groups(adata: anndata.AnnData, groupby: str | None, wanted: dict[str, str | None]) -> NDArray[np.object_] | None:
    named = {role: state for role, state in wanted.items() if state is not None}
    if groupby is None:
        if named:
            raise LabelsError(
                f"{' and '.join(f'`{role}`' for role in named)} given without `groupby`; name the column."
            )
        return None
    if not named:
        raise LabelsError(
            f"`groupby` is {groupby!r}, but neither `start` nor `goal` is given; name at least one state."
        )
    labels = groups(adata.obs, groupby, argument="groupby")
    for role, state in named.items():
        if state not in labels.names:
            raise LabelsError(
                f"`{role}` is {state!r}, but no cell of obs[{groupby!r}] is.{did_you_mean(state, list(labels.names))} "
                f"There are {', '.join(map(repr, labels.names[:10]))}."
            )
    return np.array([*labels.names, None], dtype=object)[labels.codes]
