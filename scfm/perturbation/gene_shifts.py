"""Effects of a perturbation on the states of all other genes of a cell."""

# Axes: N tokens of one cell, V values, D model width, R rows (perturbations), E genes of the vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from scfm.models.inference import TOKENS_PER_BATCH, runs_of_tokens
from scfm.perturbation.edits import TokenCell
from scfm.perturbation.runner import VariantRunner
from scfm.perturbation.shifts import ShiftRecord, cosine_distance
from scfm.perturbation.statistics import Null, describe, rank_sum, ranked
from scfm.perturbation.variants import cell_of, pack

OTHER_GENES = "all other genes under the same perturbation"


class GeneShifts(NamedTuple):
    """Shifts `values_V1` of genes in cells `cell_V`; `row_V` is the number of the perturbation times E plus the gene's token."""

    row_V: NDArray[np.int64]
    cell_V: NDArray[np.int64]
    values_V1: NDArray[np.float64]


class GeneShiftRunner(VariantRunner):
    """Compares the states of genes before and after; unperturbed cells are computed in the same batch as their variants."""

    variants_per_block = 256  # each has one value per gene of its cell

    def run_block(self, start: int, stop: int) -> GeneShifts:  # type: ignore[override]
        n_tokens = len(self.model.encoding.vocabulary)
        nothing = GeneShifts(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 1)))
        found = [nothing]
        for cell in range(start, stop):
            tokens = cell_of(self.cells, cell)
            expressed = self.editor.expressed(tokens)
            asked = self.perturbations.of_cell(cell, expressed, self.editor)
            variants = [tokens, *(self.editor.edit(tokens, genes) for _, genes in asked)] if asked else []
            states = self._states(variants)
            for (number, genes), variant, after_ND in zip(asked, variants[1:], states[1:]):
                others = expressed[~np.isin(expressed, genes)]
                # Overexpression may drop a gene if the context is full.
                gene_V, _, after_V = np.intersect1d(others, variant.gene_ids_N, return_indices=True)
                before_V = _indices(tokens, gene_V)
                shift_V = cosine_distance(states[0][before_V], after_ND[after_V])
                row_V = number * n_tokens + gene_V.astype(np.int64)
                found.append(GeneShifts(row_V, np.full(len(gene_V), cell), shift_V[:, None]))
        return GeneShifts(*map(np.concatenate, zip(*found)))

    def _states(self, variants: Sequence[TokenCell]) -> list[NDArray[np.float32]]:
        """Return the token states of each variant, (N, D), at the layer of the cell embedding."""
        network, bounds = self._network, np.cumsum([0, *map(len, variants)])
        self.n_embedded += len(variants)
        parts: list[NDArray[np.float32]] = []
        with torch.inference_mode():
            for rows in runs_of_tokens(bounds, TOKENS_PER_BATCH) if variants else ():
                batch = pack(variants[rows]).to(network.is_gene_V.device)
                states_TD = network.states_for(self._readout, batch).float().cpu()
                parts += [part.numpy() for part in states_TD.split([len(variant) for variant in variants[rows]])]
        return parts


def _indices(cell: TokenCell, gene_V: NDArray[np.int32]) -> NDArray[np.int64]:
    order = np.argsort(cell.gene_ids_N, kind="stable")
    return order[np.searchsorted(cell.gene_ids_N[order], gene_V)]


def tabulate_genes(
    shifts: ShiftRecord,
    names: Sequence[str],
    genes: Sequence[str],
    *,
    null: Null | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    min_cells: int = 1,
) -> pd.DataFrame:
    """Convert a record with one row per perturbation and gene to the table that `perturb` returns.

    `null` has numbers of perturbations. If given, a gene is tested against the same gene under these perturbations.
    """
    numbers, tokens = np.divmod(shifts.rows, len(genes))
    parts = [
        pd.DataFrame(
            {
                "gene": np.array(names, dtype=object)[numbers],
                "affected": np.array(genes, dtype=object)[tokens],
                "n_cells": shifts.n_R[shifts.rows],
            }
        ),
        describe(shifts, "shift", n_bootstrap=n_bootstrap, seed=seed),
    ]
    families = numbers if null is None else tokens
    tests = []
    for family in np.unique(families):
        rows = shifts.rows[families == family]
        of_family = None if null is None else null.among(rows // len(genes))
        test = rank_sum(shifts.of_rows(rows), "shift", null=of_family)
        tests.append(test.set_index(np.flatnonzero(families == family)))
    parts.append(pd.concat(tests).sort_index())
    table = pd.concat(parts, axis=1)
    table["null"] = OTHER_GENES if null is None else f"the same gene under {null.name}"
    return ranked(table, "shift_mean", min_cells=min_cells).reset_index(drop=True)
