"""The cells to perturb, and the cell state toward which their shift is measured."""

# Axes: B cells, D model width.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm import pp
from scfm._config import did_you_mean
from scfm.data import CellBatch
from scfm.data.columns import groups
from scfm.data.many_files import open_data
from scfm.errors import LabelsError
from scfm.models.model import Model, Precision
from scfm.perturbation.labels import LabelHead
from scfm.pp._encode import open_counts, require_cells

Measure = Literal["shift", "goal", "label"]


@dataclass(frozen=True)
class States:
    """Cells to perturb, their unperturbed vectors, and the goal or labels that effects are measured by.

    Attributes
    ----------
    cells
        The encoded cells to perturb.
    original_BD
        Vectors of the unperturbed cells, shape (B, D): embeddings, or the inputs of the class head if labels are measured.
    goal_D
        Mean embedding of the cells of the goal state, shape (D,); None without a goal.
    n_expressing
        Function that returns the number of cells that express each gene, by token id. It also counts genes that were cut off
        because a cell has more genes than the model's maximum.
    center_D
        Vector that is subtracted from all embeddings before cosines are computed, shape (D,); None to subtract nothing.
    label_B, head
        Label of each cell, shape (B,), int64, and the classifier; None if labels are not measured.
    """

    cells: CellBatch
    original_BD: NDArray[np.float32]
    goal_D: NDArray[np.float64] | None
    n_expressing: Callable[[], NDArray[np.int64]]
    center_D: NDArray[np.float64] | None = None
    label_B: Tensor | None = None
    head: LabelHead | None = None

    @property
    def measured(self) -> str:
        """Name of the measure by which effects are tested and sorted by default."""
        return "label_shift" if self.head is not None else "shift" if self.goal_D is None else "goal_shift"


def checked_measure(measure: str | None, goal: str | None, *, center: bool) -> Measure:
    """Check `measure` and return it; None means "goal" if a goal is given, else "shift"."""
    if measure is None:
        return "shift" if goal is None else "goal"
    if measure not in get_args(Measure):
        raise ValueError(f"`measure` is {measure!r}; choose one of {', '.join(get_args(Measure))}.")
    if measure == "goal" and goal is None:
        raise ValueError("`measure` is 'goal'; name the `goal`, and its column as `groupby`.")
    if measure == "label" and (goal is not None or center):
        given = "`goal`" if goal is not None else "`center`"
        raise ValueError(f"`measure` is 'label', which compares no embeddings; leave {given} out.")
    return measure  # type: ignore[return-value]


def read_states(
    adata: Any,
    model: Model,
    *,
    groupby: str | None,
    start: str | None,
    goal: str | None,
    layer: str | None,
    gene_key: str | None,
    depth_key: str | None,
    precision: Precision = "fp32",
    measure: Measure = "shift",
    center: bool = False,
) -> States:
    """Encode and embed the cells to perturb, and compute the mean embedding of the goal cells.

    The cells to perturb are those of `start`. Without `start`, they are all cells except those of the goal; without `groupby`,
    they are all cells.
    """
    data = open_data(adata)
    require_cells(data)
    group_B = _groups(data, groupby, {"start": start, "goal": goal}, state_needed=measure != "label")
    chosen = np.ones(data.n_obs, dtype=bool)
    if group_B is not None and start is not None:
        chosen = group_B == start
    elif group_B is not None and goal is not None:
        chosen = group_B != goal
    if not chosen.any():
        raise LabelsError(f"All cells are of the goal state {goal!r}; there are none to start from.")
    counts = open_counts(data, model.encoding, layer=layer, gene_key=gene_key, depth_key=depth_key)
    cells = pp.encode(counts.select(chosen), model.encoding)

    def n_expressing() -> NDArray[np.int64]:
        expression_BV = pp.log_expression(counts.select(chosen), model.encoding)
        return np.bincount(expression_BV.indices, minlength=expression_BV.shape[1])

    if measure == "label":
        has_members = model.network.gene_classifier is not None
        head = LabelHead(model, pp.log_expression(counts.select(chosen), model.encoding) if has_members else None)
        features_BD = _class_features(model, cells, precision)
        label_B = head.predict(torch.from_numpy(features_BD)) if group_B is None else _labels(group_B[chosen], model)
        return States(cells, features_BD, None, n_expressing, label_B=label_B, head=head)
    goal_D, original_BD = None, model.embed(cells, precision=precision)
    embedded = [original_BD]
    if group_B is not None and goal is not None:
        goal_cells = pp.encode(counts.select(group_B == goal), model.encoding)
        embedded.append(model.embed(goal_cells, precision=precision))
        goal_D = embedded[1].mean(0, dtype=np.float64)
    center_D = np.concatenate(embedded).mean(0, dtype=np.float64) if center else None
    if center and len(original_BD) < 2 and goal_D is None:
        raise LabelsError("`center` subtracts the mean embedding of the cells, and there is one cell only.")
    return States(cells, original_BD, goal_D, n_expressing, center_D)


@torch.no_grad()
def _class_features(model: Model, cells: CellBatch, precision: Precision) -> NDArray[np.float32]:
    network = model.network_in(precision)
    return torch.cat([network.class_features(batch).float().cpu() for batch in model.batches(cells)]).numpy()


def _labels(name_B: NDArray[np.object_], model: Model) -> Tensor:
    """Class number of each cell, from the class name in the data, shape (B,)."""
    code_of = {label: code for code, label in enumerate(model.labels)}
    if strange := sorted({str(name) for name in name_B if name not in code_of}):
        raise LabelsError(
            f"{', '.join(map(repr, strange[:5]))} are not labels of the model ({', '.join(model.labels[:10])}). Leave these "
            "cells out, or leave `groupby` out to measure the labels that the model predicts."
        )
    return torch.tensor([code_of[name] for name in name_B])


def _groups(
    adata: Any, groupby: str | None, wanted: dict[str, str | None], *, state_needed: bool
) -> NDArray[np.object_] | None:
    named = {role: state for role, state in wanted.items() if state is not None}
    if groupby is None:
        if named:
            raise LabelsError(
                f"{' and '.join(f'`{role}`' for role in named)} given without `groupby`; name the column."
            )
        return None
    if not named and state_needed:
        raise LabelsError(
            f"`groupby` is {groupby!r}, but neither `start` nor `goal` is given; name at least one state."
        )
    labels = groups(adata.obs, groupby, argument="groupby")
    for role, state in named.items():
        if state not in labels.names:
            raise LabelsError(
                f"`{role}` is {state!r}, but no cell has this value in `adata.obs[{groupby!r}]`."
                f"{did_you_mean(state, list(labels.names))} Its values: {', '.join(map(repr, labels.names[:10]))}."
            )
    return np.array([*labels.names, None], dtype=object)[labels.codes]
