"""Exact runs: what happens to a cell's embedding when genes are deleted, or turned up or down."""

# Axes: B cells, V variants, M measures.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scfm.data.ranks import gather, range_of_rank, torchrun_rank
from scfm.errors import EmptyCellError, VocabularyMismatchError
from scfm.models.model import Model, Precision
from scfm.perturbation.absent import explain_absent, none_or_some, with_absent
from scfm.perturbation.edits import Editor
from scfm.perturbation.gene_shifts import GeneShiftRunner, tabulate_genes
from scfm.perturbation.null import N_NULL, with_matched_null
from scfm.perturbation.runner import Checkpoint, Requests, VariantRunner
from scfm.perturbation.shifts import ShiftRecord, cosine_distance, goal_shift
from scfm.perturbation.states import Measure, States, checked_measure, read_states
from scfm.perturbation.statistics import Null, describe, rank_sum, ranked
from scfm.perturbation.variants import Genes, Perturbations
from scfm.vocab import Vocabulary


def perturb(
    adata: Any,
    model: Model,
    *,
    genes: Genes | None = None,
    kind: str = "delete",
    effect_on: str = "cell",
    combine: int = 1,
    quantile: float = 0.25,
    positions: str = "shift",
    measure: str | None = None,
    center: bool = False,
    groupby: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    null_genes: Genes | None = None,
    missing: str = "report",
    min_cells: int = 3,
    n_bootstrap: int = 1000,
    precision: Precision = "fp32",
    checkpoint: str | Path | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Table of what perturbing genes does to cells; `scfm.tl.perturb` explains every argument and column."""
    vocabulary = model.encoding.vocabulary
    editor = Editor.of(model.encoding, kind, positions=positions, quantile=quantile)
    by = checked_measure(measure, goal, center=center)
    on_genes = _on_genes(effect_on, genes, by)
    if missing not in ("report", "error"):
        raise ValueError(f"`missing` is {missing!r}; choose 'report' or 'error'.")
    asked = Perturbations.of(genes, vocabulary, combine=combine)
    null = None if null_genes is None else _given_null(asked, null_genes, vocabulary)
    states = read_states(
        adata,
        model,
        groupby=groupby,
        start=start,
        goal=goal,
        layer=layer,
        gene_key=gene_key,
        depth_key=depth_key,
        precision=precision,
        measure=by,
        center=center,
    )
    absent = explain_absent(asked, states, editor, model.encoding)
    if absent and (missing == "error" or len(absent) == len(asked.names) + len(asked.absent)):
        raise VocabularyMismatchError(none_or_some(absent, len(asked.names) + len(asked.absent)))
    perturbations = asked
    if null is not None:
        perturbations = asked.with_null(null, f"{len(null.names)} given null genes")
    elif asked.tokens is not None and len(asked.tokens) < N_NULL and not on_genes:
        perturbations = with_matched_null(asked, states.cells, vocabulary, editor, seed=seed)
    readout = model.network.class_readout if by == "label" else None
    runner_class = GeneShiftRunner if on_genes else VariantRunner
    runner = runner_class(model, states.cells, perturbations, editor, precision, readout)
    measures = ["shift"] if on_genes else _measures(states, perturbations)
    n_rows = len(perturbations.names) * (len(vocabulary) if on_genes else 1)
    shifts = ShiftRecord(measures, n_rows=n_rows, seed=seed)
    saved = (
        None if checkpoint is None else _checkpoint(checkpoint, runner, states, seed, effect_on=effect_on, measure=by)
    )
    run(runner, states, shifts, checkpoint=saved, progress=progress)

    options: dict[str, Any] = {"null": null_of(perturbations), "n_bootstrap": n_bootstrap, "seed": seed}
    if on_genes:
        table = tabulate_genes(shifts, perturbations.names, vocabulary.tokens, **options, min_cells=min_cells)
        return table[table["gene"].isin(asked.names)].reset_index(drop=True)
    tested = f"{by}_shift" if by != "shift" else by
    table = tabulate(shifts, perturbations.names, **options, tested=tested, min_cells=min_cells)
    if genes is not None:
        null_names = list(perturbations.names[len(asked.names) :]) if null is None else list(null.names)
        null_means = table.loc[table.index.isin(null_names), f"{tested}_mean"].tolist()
        table = with_absent(table[table.index.isin(asked.names)], absent)
        table.attrs = {"null_genes": null_names, "null_means": null_means}
    return table


def _checkpoint(
    path: str | Path, runner: VariantRunner, states: States, seed: int, *, effect_on: str, measure: Measure
) -> Checkpoint:
    """Return the checkpoint of a run, with all settings that its results depend on."""
    settings = {
        "editor": runner.editor,
        "perturbations": runner.perturbations,
        "goal": states.goal_D,
        "seed": seed,
        "effect_on": effect_on,
        "measure": measure,
        "center": states.center_D,
        "labels": None if states.label_B is None else states.label_B.tolist(),
        "expression": None
        if states.head is None or states.head.expression is None
        else states.head.expression.digest(),
    }
    return Checkpoint.of(path, runner.model, states.cells, precision=runner.precision, **settings)


def _on_genes(effect_on: str, genes: Genes | None, by: Measure) -> bool:
    if effect_on not in ("cell", "genes"):
        raise ValueError(f"`effect_on` is {effect_on!r}; choose 'cell' or 'genes'.")
    if effect_on == "genes" and genes is None:
        raise ValueError(
            "`effect_on` is 'genes', which makes a row for each pair of genes; name the `genes` to perturb."
        )
    if effect_on == "genes" and by != "shift":
        raise ValueError(f"`effect_on` is 'genes', but the measure {by!r} is computed for cells only; omit it.")
    return effect_on == "genes"


def _given_null(asked: Perturbations, null_genes: Genes, vocabulary: Vocabulary) -> Perturbations:
    null = Perturbations.of(null_genes, vocabulary)
    if asked.tokens is None:
        raise ValueError("`null_genes` is given without `genes`; name the genes to test against them.")
    if null.absent:
        raise VocabularyMismatchError(f"`null_genes`: {'; '.join(null.absent.values())}")
    return null


def null_of(perturbations: Perturbations) -> Null | None:
    """The rows that others are tested against; None for all others."""
    if perturbations.null_rows is None:
        return None
    only = np.arange(len(perturbations.asked_names), len(perturbations.names))
    return Null(np.array(perturbations.null_rows, dtype=np.int64), perturbations.null_name, only)


EXCESS = {"shift": "excess", "goal_shift": "goal_excess", "label_shift": "label_excess"}


def _measures(states: States, perturbations: Perturbations) -> list[str]:
    """Names of all measures; with combinations also what each exceeds the sum of its genes by."""
    if states.head is not None:
        measures = ["label_shift"]
    else:
        measures = ["shift"] + ["goal_shift"] * (states.goal_D is not None)
    return measures + [EXCESS[name] for name in measures] * perturbations.has_combinations()


def run(
    runner: VariantRunner,
    states: States,
    shifts: ShiftRecord,
    *,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> None:
    """Put the shifts of all variants into `shifts`; under torchrun each process runs those of its part of the cells."""
    n_of_cell_B = np.array([runner.n_of_cell(cell) for cell in range(len(states.cells))], dtype=np.int64)
    if not n_of_cell_B.any():
        raise EmptyCellError(
            f"No perturbation can be done in these {len(states.cells)} cells: each expresses one gene only."
        )
    rank, world_size = torchrun_rank()
    part = range_of_rank(len(n_of_cell_B), rank, world_size)
    n_of_cell_B = n_of_cell_B[: part.stop]
    checkpoint = None if checkpoint is None else checkpoint.of_rank(rank, world_size)
    first = max(part.start, 0 if checkpoint is None else checkpoint.load_into(shifts))
    title = {"delete": "deleting", "overexpress": "overexpressing", "inhibit": "inhibiting", "activate": "activating"}
    with tqdm(
        total=int(n_of_cell_B[part.start :].sum()),
        initial=int(n_of_cell_B[part.start : first].sum()),
        desc=title[runner.editor.kind],
        unit="variant",
        disable=not progress or rank > 0,
    ) as bar:
        for start, stop, found in runner.blocks(n_of_cell_B, first):
            if isinstance(found, Requests):
                values_VM = measure(found, states, shifts.measures, runner.perturbations, runner.editor)
                wanted = found.number_V >= 0
                shifts.add(found.number_V[wanted], found.cell_V[wanted], values_VM[wanted])
            else:
                shifts.add(*found)
            if checkpoint is not None:
                checkpoint.save(shifts, stop)
            bar.update(int(n_of_cell_B[start:stop].sum()))
    if world_size > 1:
        shifts.set_merged(gather(shifts.to_arrays()))


def measure(
    requests: Requests, states: States, measures: tuple[str, ...], perturbations: Perturbations, editor: Editor
) -> NDArray[np.float64]:
    """Every measure of every variant, shape (V, M)."""
    before_VD, after_VD = states.original_BD[requests.cell_V], requests.embedding_SD[requests.slot_V]
    if states.head is not None:
        found = {"label_shift": _network_label_shift(states, requests.cell_V, before_VD, after_VD)}
        if states.head.expression is not None:
            found["label_shift"] += _expression_label_shift(states, requests, perturbations, editor)
    else:
        center_D = 0 if states.center_D is None else states.center_D
        found = {"shift": cosine_distance(before_VD - center_D, after_VD - center_D)}
        if states.goal_D is not None:
            found["goal_shift"] = goal_shift(before_VD - center_D, after_VD - center_D, states.goal_D - center_D)
    for base in list(found):
        if EXCESS[base] in measures:
            found[EXCESS[base]] = found[base] - _sum_of_singles(requests, found[base], perturbations)
    return np.stack([found[name] for name in measures], 1).reshape(-1, len(measures))


@torch.no_grad()
def _network_label_shift(
    states: States, cell_V: NDArray[np.int64], before_VD: NDArray[np.float32], after_VD: NDArray[np.float32]
) -> NDArray[np.float64]:
    assert states.head is not None
    assert states.label_B is not None
    label_V = states.label_B[torch.from_numpy(cell_V)]
    before_V, after_V = (states.head.log_odds(torch.from_numpy(x), label_V) for x in (before_VD, after_VD))
    return (after_V - before_V).cpu().numpy()


def _expression_label_shift(
    states: States, requests: Requests, perturbations: Perturbations, editor: Editor
) -> NDArray[np.float64]:
    assert states.head is not None
    assert states.head.expression is not None
    assert states.label_B is not None
    label_B, effect = states.label_B.tolist(), states.head.expression.edit_effect
    variants = zip(requests.cell_V.tolist(), requests.number_V.tolist())
    return np.array([effect(cell, label_B[cell], perturbations.tokens_of(number), editor) for cell, number in variants])


def _sum_of_singles(
    requests: Requests, shift_V: NDArray[np.float64], perturbations: Perturbations
) -> NDArray[np.float64]:
    """For each combination the summed shifts of its genes alone; for a single its own shift, so that its excess is 0."""
    assert perturbations.tokens is not None
    sums_V = shift_V.copy()
    singles = {
        (cell, -1 - number): shift
        for cell, number, shift in zip(requests.cell_V.tolist(), requests.number_V.tolist(), shift_V)
        if number < 0
    }
    for variant, (cell, number) in enumerate(zip(requests.cell_V.tolist(), requests.number_V.tolist())):
        if number >= 0 and len(tokens := perturbations.tokens[number]) > 1:
            sums_V[variant] = sum(singles[cell, token] for token in tokens)
    return sums_V


def tabulate(
    shifts: ShiftRecord,
    names: tuple[str, ...],
    *,
    null: Null | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    tested: str | None = None,
    min_cells: int = 1,
) -> pd.DataFrame:
    """Turn a record into the table that `perturb` returns; `tested` is the measure of tests and order."""
    tested = tested or next(name for name in ("label_shift", "goal_shift", "shift") if name in shifts.measures)
    parts = [pd.DataFrame({"n_cells": shifts.n_R[shifts.rows]})]
    parts += [describe(shifts, name, n_bootstrap=n_bootstrap, seed=seed) for name in shifts.measures]
    parts += [rank_sum(shifts, tested, null=null)]
    table = pd.concat(parts, axis=1)
    table.index = pd.Index([names[row] for row in shifts.rows], name="gene")
    return ranked(table, f"{tested}_mean", min_cells=min_cells)
