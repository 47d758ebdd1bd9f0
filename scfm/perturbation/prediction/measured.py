"""Measured perturbations as changes of mean expression."""

# Axes: B cells, P perturbations, G genes of the matrix.

from __future__ import annotations

from dataclasses import dataclass

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm import baselines
from scfm.data import CountMatrix
from scfm.errors import LabelsError

MIN_CELLS = 5  # perturbations with fewer are left out: their mean says little


@dataclass(frozen=True)
class Measured:
    """Means of perturbed cells minus the mean of control cells.

    Attributes
    ----------
    targets
        Genes of each perturbation, one tuple each.
    change_PG
        Change of mean log1p counts per 10,000, float64.
    control_BG
        Log-normalised control cells.
    genes
        Names of the columns.
    """

    targets: tuple[tuple[str, ...], ...]
    change_PG: NDArray[np.float64]
    control_BG: sparse.csr_matrix
    control_rows: NDArray[np.int64]
    genes: tuple[str, ...]

    def without(self, place: int) -> Measured:
        """Leave one perturbation out."""
        kept = [other for other in range(len(self.targets)) if other != place]
        targets = tuple(self.targets[other] for other in kept)
        return Measured(targets, self.change_PG[kept], self.control_BG, self.control_rows, self.genes)


def read_measured(
    adata: anndata.AnnData, *, perturbation_key: str, control: str, separator: str, layer: str | None
) -> Measured:
    """Average the cells of each perturbation.

    Raises
    ------
    LabelsError
        If the column or the control is missing, or fewer than three perturbations have enough cells.
    """
    if perturbation_key not in adata.obs:
        raise LabelsError(f"`perturbation_key` is {perturbation_key!r}, not in `adata.obs` ({', '.join(adata.obs)}).")
    names_B = adata.obs[perturbation_key].astype(str).to_numpy(dtype=object)
    if not (names_B == control).any():
        shown = ", ".join(map(repr, sorted(set(names_B))[:10]))
        raise LabelsError(f"`control` is {control!r}, but no cell of obs[{perturbation_key!r}] is; there are {shown}.")
    blocks, depths = zip(
        *((block, depth_B) for _, block, depth_B in CountMatrix.from_adata(adata, layer=layer).blocks())
    )
    expression_BG = baselines.log_normalize(sparse.vstack(blocks, format="csr"), np.concatenate(depths))
    control_B = names_B == control
    control_G = np.asarray(expression_BG[control_B].mean(0), dtype=np.float64).ravel()
    names, counts = np.unique(names_B[adata.obs[perturbation_key].notna().to_numpy() & ~control_B], return_counts=True)
    names = names[counts >= MIN_CELLS]
    if len(names) < 3:
        raise LabelsError(
            f"{len(names)} perturbations of obs[{perturbation_key!r}] have {MIN_CELLS} cells or more; at least 3 are needed."
        )
    means = [np.asarray(expression_BG[names_B == name].mean(0), dtype=np.float64).ravel() for name in names]
    return Measured(
        tuple(tuple(str(name).split(separator)) for name in names),
        np.stack(means) - control_G,
        expression_BG[control_B],
        np.flatnonzero(control_B),
        tuple(map(str, adata.var_names)),
    )
