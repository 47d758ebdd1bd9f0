"""The directions in which deletions move cells, found by exact deletions in a few of them."""

# Axes: B cells, V variants, D model width, R directions.

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.data import CellBatch
from scfm.models.model import Model
from scfm.perturbation.edits import Editor
from scfm.perturbation.runner import embed_variants
from scfm.perturbation.screening.estimate import Estimator
from scfm.perturbation.variants import cell_of

CALIBRATION_CELLS = 10
GENES_PER_CELL = 64

_log = logging.getLogger(__name__)


def projections(model: Model, cells: CellBatch, *, positions: str, n_projections: int, seed: int = 0) -> Tensor:
    """Main axes of the part of exact deletions that needs directions, shape (D, n_projections), float32.

    They are computed from at most `GENES_PER_CELL` genes in each of at most `CALIBRATION_CELLS` of the given cells, which
    `seed` draws; nothing is kept.
    """
    rng = np.random.default_rng(seed)
    long_enough = np.flatnonzero(np.diff(cells.cu_seqlens.numpy()) > model.encoding.config.n_special_tokens + 1)
    chosen = np.sort(rng.choice(long_enough, min(CALIBRATION_CELLS, len(long_enough)), replace=False))
    parts = [_remainder(model, cells, cell=int(cell), positions=positions, rng=rng) for cell in chosen]
    moved_VD = np.concatenate(parts)
    _log.info("calibrated screen directions on %d deletions in %d cells", len(moved_VD), len(chosen))
    values, vectors = np.linalg.eigh(moved_VD.T @ moved_VD)
    directions_DR = vectors[:, np.argsort(-values)[:n_projections]]
    return torch.from_numpy(directions_DR.astype(np.float32)).to(model.device)


def _remainder(
    model: Model, cells: CellBatch, *, cell: int, positions: str, rng: np.random.Generator
) -> NDArray[np.float64]:
    editor = Editor.of(model.encoding, "delete", positions=positions)
    tokens = cell_of(cells, cell)
    genes = editor.expressed(tokens)
    genes = rng.choice(genes, min(GENES_PER_CELL, len(genes)), replace=False)
    estimator = Estimator(model.network, cells.select([cell]), positions=positions)
    variants = [editor.edit(tokens, [gene]) for gene in genes]
    after_VD = embed_variants(model.network, variants)
    index_of = {int(gene): index for index, gene in enumerate(tokens.gene_ids_N)}
    term_VD = estimator.exact_terms()[[index_of[int(gene)] for gene in genes]].cpu().numpy()
    left_VD = after_VD.astype(np.float64) - estimator.mean_BD.double().cpu().numpy() - term_VD
    # Every cell has the same weight: a short cell moves more on each deletion than a long one.
    return left_VD / np.sqrt((left_VD**2).sum() / len(left_VD) + 1e-300)
