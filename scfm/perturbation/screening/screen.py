"""Screen: every gene of every cell, ranked by an estimate, the best verified exactly."""

# Axes: B cells, T packed tokens, D model width, R directions.

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm.data import CellBatch
from scfm.models.inference import TOKENS_PER_BATCH, runs_of_tokens
from scfm.models.model import Model, Precision
from scfm.models.network import CellTransformer, Readout
from scfm.perturbation.edits import Editor
from scfm.perturbation.exact import run, tabulate
from scfm.perturbation.runner import VariantRunner
from scfm.perturbation.screening.directions import projections
from scfm.perturbation.screening.estimate import Estimator, require_screenable
from scfm.perturbation.screening.recall import recall_estimate
from scfm.perturbation.shifts import ShiftRecord
from scfm.perturbation.states import States, checked_measure, read_states
from scfm.perturbation.statistics import ranked
from scfm.perturbation.variants import Perturbations

N_TOP = 50  # best genes whose recall is estimated

_log = logging.getLogger(__name__)


def screen(
    adata: Any,
    model: Model,
    *,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    positions: str = "shift",
    measure: str | None = None,
    center: bool = False,
    n_verify: int = 75,
    n_check: int = 20,
    n_projections: int = 8,
    min_cells: int = 3,
    n_bootstrap: int = 1000,
    precision: Precision = "fp32",
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Table of what deleting each gene does, estimated, the best verified; `scfm.tl.screen` explains it."""
    by = checked_measure(measure, goal, center=center)
    if by == "shift" and goal is not None:
        raise ValueError(
            "`measure` is 'shift', but a screen with a `goal` ranks genes by the measure 'goal'; omit one of them."
        )
    readout = model.network.class_readout if by == "label" else model.network.embedding_readout
    require_screenable(model, readout)
    states = read_states(
        adata,
        model,
        groupby=groupby,
        start=start,
        goal=goal,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
        measure=by,
        center=center,
    )
    measured = states.measured
    estimates = ShiftRecord([measured, "rank_only"], n_rows=len(model.encoding.vocabulary), seed=seed)
    directions = None
    if by == "shift":
        directions = projections(model, states.cells, positions=positions, n_projections=n_projections, seed=seed)
    network = model.network_in(precision)
    estimate_all(network, states, estimates, directions, readout=readout, positions=positions, progress=progress)
    min_cells = min(min_cells, len(states.cells))
    candidates = _candidates(estimates, measured, min_cells)
    best, others = candidates.index[:n_verify].to_numpy(), candidates.index[n_verify:].to_numpy()
    n_check = min(n_check if n_verify else 0, len(others))
    checked = np.random.default_rng(seed).choice(others, n_check, replace=False)
    exact = _verify(
        model,
        states,
        tokens=np.concatenate([best, checked]),
        readout=readout,
        positions=positions,
        seed=seed,
        progress=progress,
    )

    table = _joined(estimates, exact, measured, model, n_bootstrap=n_bootstrap, seed=seed)
    table = ranked(table, f"{measured}_mean", min_cells=min_cells)
    table.attrs = _summary(candidates, exact=exact, measure=measured, best=best, checked=checked)
    return table


def estimate_all(
    network: CellTransformer,
    states: States,
    estimates: ShiftRecord,
    directions: torch.Tensor | None,
    *,
    readout: Readout,
    positions: str,
    progress: bool = False,
) -> None:
    """Put the estimates of all genes of all cells into `estimates`."""
    cells = states.cells
    with tqdm(total=len(cells), desc="screening", unit="cell", disable=not progress) as bar:
        for rows in runs_of_tokens(cells.cu_seqlens.numpy(), TOKENS_PER_BATCH // 2):
            batch = cells.select(torch.arange(rows.start, rows.stop))
            estimator = Estimator(network, batch, positions=positions, readout=readout)
            value_T = _estimate(estimator, states, rows, directions)
            # A cell's only gene cannot be deleted.
            counts_T = (estimator.is_gene_T & (estimator.n_genes_B > 1)[estimator.cell_T]).cpu().numpy()
            values_TM = np.stack([value_T.cpu().numpy(), relative_rank(batch, counts_T)], 1)[counts_T]
            cell_T = estimator.cell_T.cpu().numpy()[counts_T] + rows.start
            estimates.add(batch.gene_ids_T.numpy()[counts_T].astype(np.int64), cell_T, values_TM)
            bar.update(len(batch))


def _estimate(estimator: Estimator, states: States, rows: slice, directions: torch.Tensor | None) -> torch.Tensor:
    """Estimated effect of each token's deletion by the measure of `states`, shape (T,), float64."""
    device = estimator.mean_BD.device
    center_D = None if states.center_D is None else torch.from_numpy(states.center_D).to(device)
    if states.head is not None:
        assert states.label_B is not None
        label_B = states.label_B[rows]
        shift_T = estimator.label_shift(states.head, label_B)
        if (expression := states.head.expression) is None:
            return shift_T
        cell_T, genes_T = estimator.cell_T.cpu(), estimator.cells.gene_ids_T.cpu().numpy().astype(np.int64)
        return shift_T + expression.deletion_effects(genes_T, cell_T.numpy() + rows.start, label_B[cell_T]).to(device)
    if states.goal_D is not None:
        return estimator.goal_shift(torch.from_numpy(states.goal_D).to(device), center_D)
    assert directions is not None
    return estimator.shift(directions, center_D)


def relative_rank(cells: CellBatch, is_gene_T: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Rank of each gene in its cell, by position or by falling value, from 0 (first) to 1 (last); shape (T,)."""
    rank_T = np.zeros(cells.n_tokens)
    bounds = cells.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        genes = start + np.flatnonzero(is_gene_T[start:stop])
        if cells.values_T is not None:
            genes = genes[np.argsort(-cells.values_T.numpy()[genes], kind="stable")]
        rank_T[genes] = np.arange(len(genes)) / max(len(genes) - 1, 1)
    return rank_T


def _candidates(estimates: ShiftRecord, measure: str, min_cells: int) -> pd.DataFrame:
    """Tokens of the genes in enough cells, the best by `estimate` first, with their mean `rank` in a cell."""
    sign = -1 if measure == "label_shift" else 1  # the genes that hold a label are those whose deletion lowers its odds
    table = pd.DataFrame(
        {"estimate": sign * estimates.mean(measure), "rank": estimates.mean("rank_only")}, estimates.rows
    )
    enough = estimates.n_R[estimates.rows] >= min_cells
    return table[enough].sort_values("estimate", ascending=False, kind="stable")


def _verify(
    model: Model,
    states: States,
    *,
    tokens: NDArray[np.int64],
    readout: Readout,
    positions: str,
    seed: int,
    progress: bool,
) -> ShiftRecord | None:
    """Exact shifts, in rows by token id; None if nothing is to be verified."""
    if not len(tokens):
        return None
    names = model.encoding.vocabulary.tokens
    perturbations = Perturbations(tuple((int(token),) for token in tokens), tuple(names[token] for token in tokens))
    editor = Editor.of(model.encoding, "delete", positions=positions)
    runner = VariantRunner(model, states.cells, perturbations, editor, readout=readout)
    measures = list(dict.fromkeys(["shift" if states.head is None else "label_shift", states.measured]))
    by_number = ShiftRecord(measures, n_rows=len(tokens), seed=seed)
    run(runner, states, by_number, progress=progress)
    return by_number.renumbered(tokens, n_rows=len(names))


def _joined(
    estimates: ShiftRecord, exact: ShiftRecord | None, measure: str, model: Model, *, n_bootstrap: int, seed: int
) -> pd.DataFrame:
    names = model.encoding.vocabulary.tokens
    table = tabulate(estimates.only(measure), names, n_bootstrap=n_bootstrap, seed=seed)
    table.insert(1, "estimate_mean", table[f"{measure}_mean"])
    table.insert(1, "exact", False)
    rank = pd.Series(estimates.mean("rank_only"), index=[names[row] for row in estimates.rows])
    table["rank_only"] = rank[table.index].to_numpy()
    if exact is not None:
        verified = tabulate(exact.only(measure), names, n_bootstrap=n_bootstrap, seed=seed)
        columns = [name for name in verified if name.startswith(measure)]
        table.loc[verified.index, columns] = verified[columns]
        table.loc[verified.index, "exact"] = True
    return table


def _summary(
    candidates: pd.DataFrame,
    *,
    exact: ShiftRecord | None,
    measure: str,
    best: NDArray[np.int64],
    checked: NDArray[np.int64],
) -> dict[str, float]:
    if exact is None:
        return {"recall_estimate": float("nan"), "rank_only_recall": float("nan"), "n_top": 0}
    estimate, truth = (
        candidates["estimate"],
        pd.Series((-1 if measure == "label_shift" else 1) * exact.mean(measure), exact.rows),
    )
    n_top = min(N_TOP, max(1, 2 * len(best) // 3))
    recall = recall_estimate(
        exact_V=truth[best].to_numpy(), estimate_V=estimate[best].to_numpy(), exact_C=truth[checked].to_numpy(),
        estimate_C=estimate[checked].to_numpy(), estimate_U=estimate.drop(best).to_numpy(), n_top=n_top,
        ratios=measure == "shift",
    )  # fmt: skip
    top = truth[best].sort_values(ascending=False, kind="stable").index[:n_top]
    by_rank = candidates["rank"].sort_index().sort_values(kind="stable").index[: len(best)]
    summary = {"recall_estimate": recall, "rank_only_recall": float(top.isin(by_rank).mean()), "n_top": n_top}
    _log.info("expected recall of the best %d: %.2f (by rank alone: %.2f)", n_top, recall, summary["rank_only_recall"])
    return summary
