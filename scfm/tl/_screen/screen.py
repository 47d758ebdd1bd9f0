"""`scfm.tl.screen`: every gene of every cell, ranked by an estimate, the best verified exactly."""

# Axes: B cells, T packed tokens, D model width, R directions.

from __future__ import annotations

import itertools
import logging

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm.data import CellBatch
from scfm.models.model import TOKENS_PER_BATCH, Model, Precision, runs_of_tokens
from scfm.models.network import CellTransformer
from scfm.tl._perturb.edits import Editor
from scfm.tl._perturb.perturb import run, tabulate
from scfm.tl._perturb.shifts import ShiftRecord
from scfm.tl._perturb.states import States, read_states
from scfm.tl._perturb.stream import VariantRunner
from scfm.tl._perturb.variants import Perturbations
from scfm.tl._record import record as note
from scfm.tl._screen.calibrate import projections
from scfm.tl._screen.estimate import Estimator, require_screenable
from scfm.tl._screen.recall import recall_estimate

N_TOP = 50  # best genes whose recall is estimated

_log = logging.getLogger(__name__)


def screen(
    adata: anndata.AnnData,
    model: Model,
    *,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    positions: str = "shift",
    n_verify: int = 75,
    n_check: int = 20,
    n_projections: int = 8,
    min_cells: int = 1,
    n_bootstrap: int = 1000,
    precision: Precision = "fp32",
    layer: str | None = None,
    gene_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Estimate what deleting each gene does, for all genes of each cell at once, and verify the best.

    Exact deletion of the N genes of a cell takes N forward passes. The estimate takes `n_projections` backward passes,
    or one toward a goal, and under a rank encoding that shifts five forward passes more, or eight toward a goal.

    Parameters
    ----------
    adata
        Raw counts of the cells, n_obs cells by n_vars genes.
    model
        From `scfm.fit` or `scfm.load`; mean or `cls` embedding, softmax attention.
    groupby, start, goal
        As in `scfm.tl.perturb`. With a goal, genes are ranked by how far their deletion moves cells toward it.
    positions
        As in `scfm.tl.perturb`: "shift" or "held". Matters for rank encodings only.
    n_verify
        How many of the best genes to delete exactly, in every cell that expresses them.
    n_check
        How many random other genes to delete exactly, for the estimate of the recall.
    n_projections
        Directions in which the estimate resolves what other genes do, without a goal. They are found once for a model, by
        640 exact deletions in ten of these cells, and saved with it.
    min_cells
        Genes that fewer cells express are not ranked among the best.
    n_bootstrap
        Resamples of cells behind the intervals; 0 for none.
    precision
        Of the estimates: "fp32", or "bf16" for blocks in bfloat16, two to three times faster where the machine has it. The
        best genes are verified in fp32 all the same.
    layer, gene_key
        As in `scfm.tl.embed`.
    key_added
        Where the table goes in `adata.uns`; None for nowhere.
    seed
        Of calibration, checked genes and bootstrap.
    progress
        Whether to show progress bars.

    Returns
    -------
    A row a gene, the best first, as from `scfm.tl.perturb` (`goal_shift_...` in place of `shift_...` with a goal), and

    - `exact`: whether mean, deviation and interval of the row are exact; else they are those of the estimate
    - `estimate_mean`: the estimate, also where the row is exact; tests and effect sizes compare estimates with estimates
    - `rank_only`: the gene's mean place in its cells, from 0 (first by rank, or largest value) to 1, as a control

    `attrs` has `recall_estimate`, the expected share of the exact best 50 that was verified; `rank_only_recall`, the share
    of the best 50 found that as many genes chosen by `rank_only` would have held; and `n_top`, that 50 or fewer.

    Raises
    ------
    ValueError
        If the model is not one that the estimate describes; use `scfm.tl.perturb`.

    Notes
    -----
    Where rank embeddings are rough (short training), moving up a rank dominates every shift, and the best genes are the
    highest ranked: look at `rank_only_recall`, and use ``positions="held"``. The estimate follows such ranks too, by the forward
    passes named above.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> model = scfm.fit(adata, config=scfm.FitConfig(n_steps=2), progress=False)
    >>> table = scfm.tl.screen(adata[:4], model, n_verify=5, progress=False)
    >>> int(table["exact"].sum()) - 20
    5
    """
    require_screenable(model)
    states = read_states(adata, model, groupby=groupby, start=start, goal=goal, layer=layer, gene_key=gene_key)
    measure = "shift" if states.goal_D is None else "goal_shift"
    estimates = ShiftRecord([measure, "rank_only"], n_rows=len(model.encoding.vocabulary), seed=seed)
    directions = None
    if states.goal_D is None:
        directions = projections(model, states.cells, positions=positions, n_projections=n_projections, seed=seed)
    network = model.network_in(precision)
    estimate_all(network, states, estimates, directions, positions=positions, progress=progress)
    candidates = _candidates(estimates, measure, min_cells)
    best, others = candidates.index[:n_verify].to_numpy(), candidates.index[n_verify:].to_numpy()
    n_check = min(n_check if n_verify else 0, len(others))
    checked = np.random.default_rng(seed).choice(others, n_check, replace=False)
    exact = _verify(model, states, np.concatenate([best, checked]), positions, seed, progress)

    table = _joined(estimates, exact, measure, model, n_bootstrap=n_bootstrap, seed=seed)
    table.attrs = _summary(candidates, exact, measure, best, checked)
    if key_added is not None:
        adata.uns[key_added] = table.copy()
        note(
            adata,
            model,
            key_added,
            groupby=groupby,
            start=start,
            goal=goal,
            positions=positions,
            precision=precision,
            **table.attrs,
        )
    return table


def estimate_all(
    network: CellTransformer,
    states: States,
    estimates: ShiftRecord,
    directions: torch.Tensor | None,
    *,
    positions: str,
    progress: bool = False,
) -> None:
    """Put the estimates of all genes of all cells into `estimates`."""
    cells = states.cells
    with tqdm(total=len(cells), desc="screening", unit="cell", disable=not progress) as bar:
        for rows in runs_of_tokens(cells.cu_seqlens.numpy(), TOKENS_PER_BATCH // 2):
            batch = cells.select(torch.arange(rows.start, rows.stop))
            estimator = Estimator(network, batch, positions=positions)
            if states.goal_D is None:
                assert directions is not None
                value_T = estimator.shift(directions)
            else:
                value_T = estimator.goal_shift(torch.from_numpy(states.goal_D).to(estimator.mean_BD.device))
            # Taking a cell's only gene away is no deletion.
            counts_T = (estimator.is_gene_T & (estimator.n_genes_B > 1)[estimator.cell_T]).cpu().numpy()
            values_TM = np.stack([value_T.cpu().numpy(), relative_place(batch, counts_T)], 1)[counts_T]
            cell_T = estimator.cell_T.cpu().numpy()[counts_T] + rows.start
            estimates.add(batch.gene_ids_T.numpy()[counts_T].astype(np.int64), cell_T, values_TM)
            bar.update(len(batch))


def relative_place(cells: CellBatch, is_gene_T: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Place of each gene among those of its cell, by rank or by falling value, from 0 to 1; shape (T,)."""
    place_T = np.zeros(cells.n_tokens)
    bounds = cells.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        genes = start + np.flatnonzero(is_gene_T[start:stop])
        if cells.values_T is not None:
            genes = genes[np.argsort(-cells.values_T.numpy()[genes], kind="stable")]
        place_T[genes] = np.arange(len(genes)) / max(len(genes) - 1, 1)
    return place_T


def _candidates(estimates: ShiftRecord, measure: str, min_cells: int) -> pd.DataFrame:
    """Tokens of the genes in enough cells, the best by `estimate` first, with their `place` among a cell's genes."""
    table = pd.DataFrame({"estimate": estimates.mean(measure), "place": estimates.mean("rank_only")}, estimates.rows)
    enough = estimates.n_R[estimates.rows] >= min_cells
    return table[enough].sort_values("estimate", ascending=False, kind="stable")


def _verify(
    model: Model, states: States, tokens: NDArray[np.int64], positions: str, seed: int, progress: bool
) -> ShiftRecord | None:
    """Exact shifts, in rows by token id; None where nothing is to be verified."""
    if not len(tokens):
        return None
    names = model.encoding.vocabulary.tokens
    perturbations = Perturbations(tuple((int(token),) for token in tokens), tuple(names[token] for token in tokens))
    runner = VariantRunner(model, states.cells, perturbations, Editor.of(model.encoding, "delete", positions=positions))
    measures = ["shift"] if states.goal_D is None else ["shift", "goal_shift"]
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
    place = pd.Series(estimates.mean("rank_only"), index=[names[row] for row in estimates.rows])
    table["rank_only"] = place[table.index].to_numpy()
    if exact is not None:
        verified = tabulate(exact.only(measure), names, n_bootstrap=n_bootstrap, seed=seed)
        columns = [name for name in verified if name.startswith(measure)]
        table.loc[verified.index, columns] = verified[columns]
        table.loc[verified.index, "exact"] = True
    return table.sort_values(f"{measure}_mean", ascending=False, kind="stable")


def _summary(
    candidates: pd.DataFrame,
    exact: ShiftRecord | None,
    measure: str,
    best: NDArray[np.int64],
    checked: NDArray[np.int64],
) -> dict[str, float]:
    if exact is None:
        return {"recall_estimate": float("nan"), "rank_only_recall": float("nan"), "n_top": 0}
    estimate, truth = candidates["estimate"], pd.Series(exact.mean(measure), exact.rows)
    n_top = min(N_TOP, max(1, 2 * len(best) // 3))
    recall = recall_estimate(
        exact_V=truth[best].to_numpy(), estimate_V=estimate[best].to_numpy(), exact_C=truth[checked].to_numpy(),
        estimate_C=estimate[checked].to_numpy(), estimate_U=estimate.drop(best).to_numpy(), n_top=n_top,
        ratios=measure == "shift",
    )  # fmt: skip
    top = truth[best].sort_values(ascending=False, kind="stable").index[:n_top]
    by_rank = candidates["place"].sort_index().sort_values(kind="stable").index[: len(best)]
    summary = {"recall_estimate": recall, "rank_only_recall": float(top.isin(by_rank).mean()), "n_top": n_top}
    _log.info("expected recall of the best %d: %.2f (by rank alone: %.2f)", n_top, recall, summary["rank_only_recall"])
    return summary
