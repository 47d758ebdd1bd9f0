"""The null for a short list of genes: other genes that are expressed in a similar number of cells."""

# Axes: V tokens of the vocabulary, C candidates.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scfm.data import CellBatch
from scfm.perturbation.edits import Editor
from scfm.perturbation.variants import Perturbations
from scfm.vocab import Vocabulary

N_NULL = 100  # number of perturbations of the null; a list of this length or more is its own null
MAX_NULL_CELLS = 200  # cells in which they are done, so at most 20,000 variants


def with_matched_null(
    asked: Perturbations, cells: CellBatch, vocabulary: Vocabulary, editor: Editor, *, seed: int
) -> Perturbations:
    """Append about 100 perturbations of other genes, which are expressed in a similar number of cells.

    For each requested gene, others are drawn from those with the most similar number of cells.
    """
    assert asked.tokens is not None
    rng = np.random.default_rng(seed)
    n_cells_V = np.bincount(_expressed(cells, editor), minlength=len(vocabulary))
    candidates = (
        vocabulary.gene_ids if not editor.needs_expression else vocabulary.gene_ids[n_cells_V[vocabulary.gene_ids] > 0]
    )
    candidates = np.setdiff1d(candidates, [token for tokens in asked.tokens for token in tokens])
    per_group = -(-N_NULL // max(len(asked.tokens), 1))
    groups: dict[tuple[int, ...], None] = {}
    for tokens in asked.tokens:
        drawn = [_nearest(token, candidates, n_cells_V=n_cells_V, n=per_group, rng=rng) for token in tokens]
        groups |= {tuple(group): None for group in np.stack(drawn, 1).tolist() if len(set(group)) == len(group)}
    names = tuple("+".join(vocabulary.tokens[token] for token in group) for group in groups)
    chosen = rng.choice(len(cells), min(MAX_NULL_CELLS, len(cells)), replace=False)
    name = f"{len(groups)} {'groups of genes' if asked.has_combinations() else 'genes'} matched by expression"
    return asked.with_null(Perturbations(tuple(groups), names), name, frozenset(chosen.tolist()))


def _expressed(cells: CellBatch, editor: Editor) -> NDArray[np.int32]:
    """Return the tokens of all genes that each cell expresses, one cell after another."""
    ids_T = cells.gene_ids_T.numpy()
    return ids_T[cells.values_T.numpy() > 0] if editor.keeps_zeros and cells.values_T is not None else ids_T


def _nearest(
    token: int, candidates_C: NDArray[np.int32], *, n_cells_V: NDArray[np.int64], n: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """Draw `n` of the 2 n candidates with the most similar number of cells; with repeats if there are fewer than `n`."""
    order = np.argsort(np.abs(n_cells_V[candidates_C] - n_cells_V[token]), kind="stable")
    near = candidates_C[order[: 2 * n]]
    return rng.choice(near, n, replace=len(near) < n) if len(near) else near
