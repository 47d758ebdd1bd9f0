"""Features of a perturbed gene by the model: the shift of control cells when it is deleted."""

# Axes: N tokens of one cell, F features.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scfm.data import CellBatch
from scfm.models.model import Model
from scfm.perturbation.edits import Editor, TokenCell
from scfm.perturbation.runner import embed_variants
from scfm.perturbation.variants import cell_of


def target_features(model: Model, cells: CellBatch, genes: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Mean shift of the cells' embeddings when each gene is deleted, (F,), standardized over genes, then of length 1.

    A gene that a cell does not express is inserted first, as its weakest gene, so that the perturbed gene is always in the
    input. Genes that are not in the vocabulary get zeros, the mean.
    """
    tokens = model.encoding.vocabulary.find(genes)[0]
    in_vocabulary = [gene for gene, token in zip(genes, tokens) if token >= 0]
    raw = [_features(model, cells, int(token)) for token in tokens if token >= 0]
    if not raw:
        return {gene: np.zeros(1) for gene in genes}
    raw_PF = np.stack(raw)
    scaled_PF = (raw_PF - raw_PF.mean(0)) / np.maximum(raw_PF.std(0), 1e-12)
    scaled_PF /= np.maximum(np.linalg.norm(scaled_PF, axis=1, keepdims=True), 1e-12)
    found = dict(zip(in_vocabulary, scaled_PF))
    return {gene: found.get(gene, np.zeros(raw_PF.shape[1])) for gene in genes}


def _features(model: Model, cells: CellBatch, token: int) -> NDArray[np.float64]:
    editor = Editor.of(model.encoding, "delete")
    present = [with_gene(cell_of(cells, cell), token, editor) for cell in range(len(cells))]
    absent = [editor.edit(cell, [token]) for cell in present]
    moved_BD = embed_variants(model.network, absent) - embed_variants(model.network, present)
    return moved_BD.mean(0, dtype=np.float64)


def with_gene(cell: TokenCell, token: int, editor: Editor) -> TokenCell:
    """The cell, with the gene as its weakest if it was not expressed."""
    if token in editor.expressed(cell):
        return cell
    stop = len(cell) - editor.n_back
    if editor.context_length is not None and len(cell) >= editor.context_length:
        cell = _drop(cell, stop - 1)
        stop -= 1
    if cell.values_N is None:
        return TokenCell(np.insert(cell.gene_ids_N, stop, token))
    values = cell.values_N.copy()
    genes = values[editor.n_front : stop]
    weakest = genes[genes > 0].min() if (genes > 0).any() else np.float32(1)
    if editor.keeps_zeros:
        return TokenCell(cell.gene_ids_N, np.where(cell.gene_ids_N == token, weakest, values))
    index = editor.n_front + int(np.searchsorted(cell.gene_ids_N[editor.n_front : stop], token))
    return TokenCell(np.insert(cell.gene_ids_N, index, token), np.insert(values, index, weakest))


def _drop(cell: TokenCell, index: int) -> TokenCell:
    values = None if cell.values_N is None else np.delete(cell.values_N, index)
    return TokenCell(np.delete(cell.gene_ids_N, index), values)
