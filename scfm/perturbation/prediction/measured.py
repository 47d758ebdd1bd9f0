"""Measured perturbations as changes of mean expression."""

# Axes: B cells, P perturbations, G genes of the matrix.

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scfm._config import did_you_mean
from scfm.data import CountSource
from scfm.data.columns import groups
from scfm.errors import LabelsError
from scfm.perturbation.prediction.targets import Target, read_target
from scfm.vocab import strip_version

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
    genes
        Name of each column, of the kind that perturbations are named by.
    columns
        Name of each column in tables.
    names
        Name of each perturbation as in the data, without the control's.
    left_out
        Perturbations that are not used, with the reason.
    control_rows
        Rows of the control cells.
    """

    targets: tuple[Target, ...]
    change_PG: NDArray[np.float64]
    genes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    control_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def without(self, row: int) -> Measured:
        """Leave one perturbation out."""
        kept = [other for other in range(len(self.targets)) if other != row]
        return replace(
            self, targets=tuple(self.targets[other] for other in kept), change_PG=self.change_PG[kept], names=()
        )


def read_measured(
    adata: anndata.AnnData,
    *,
    perturbation_key: str,
    control: str,
    separator: str,
    layer: str | None,
    gene_key: str | None,
    depth_key: str | None,
) -> Measured:
    """Average the cells of each perturbation; all spellings of one set of genes are one perturbation.

    Raises
    ------
    LabelsError
        If the column or the control is missing, or fewer than three perturbations have enough cells.

    Warns
    -----
    UserWarning
        If perturbations are left out because they have too few cells.
    """
    labels = groups(adata.obs, perturbation_key, argument="perturbation_key")
    spellings: dict[Target, list[int]] = {}
    for code, name in enumerate(labels.names):
        spellings.setdefault(read_target(name, control=control, separator=separator), []).append(code)
    control_B = np.isin(labels.codes, spellings.pop((), []))
    if not control_B.any():
        raise LabelsError(
            f"`control` is {control!r}, but no cell has this value in `adata.obs[{perturbation_key!r}]`."
            f"{did_you_mean(control, list(labels.names))} Its values: {', '.join(map(repr, labels.names[:10]))}."
        )
    rows = {target: np.flatnonzero(np.isin(labels.codes, codes)) for target, codes in sorted(spellings.items())}
    names = {target: _shown(labels.names[codes[0]], control, separator) for target, codes in spellings.items()}
    few = {target: len(of_target) for target, of_target in rows.items() if len(of_target) < MIN_CELLS}
    kept = [target for target in rows if target not in few]
    if len(kept) < 3:
        raise LabelsError(
            f"{len(kept)} perturbations of obs[{perturbation_key!r}] have {MIN_CELLS} cells or more; at least 3 are needed."
        )
    left_out = {names[target]: f"{n} cells" for target, n in few.items()}
    if left_out:
        warnings.warn(
            f"{len(left_out)} perturbations have fewer than {MIN_CELLS} cells and are left out: "
            f"{', '.join(list(left_out)[:5])}.",
            stacklevel=4,
        )
    expression_BG, genes, columns = log_expression(adata, layer=layer, gene_key=gene_key, depth_key=depth_key)
    control_G = np.asarray(expression_BG[control_B].mean(0), dtype=np.float64).ravel()
    means = [np.asarray(expression_BG[rows[target]].mean(0), dtype=np.float64).ravel() for target in kept]
    return Measured(
        targets=tuple(kept),
        change_PG=np.stack(means) - control_G,
        genes=genes,
        columns=columns,
        names=tuple(names[target] for target in kept),
        left_out=left_out,
        control_rows=np.flatnonzero(control_B),
    )


def _shown(name: str, control: str, separator: str) -> str:
    """A name as it is in the data, without the control."""
    parts = (part.strip() for part in name.split(separator))
    return separator.join(dict.fromkeys(part for part in parts if part not in (control, "")))


def log_expression(
    adata: anndata.AnnData, *, layer: str | None, gene_key: str | None, depth_key: str | None
) -> tuple[sparse.csr_matrix, tuple[str, ...], tuple[str, ...]]:
    """log1p counts per 10,000 by gene, the names of the genes, and their `var_names` (of the first column of each)."""
    source = CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key)
    expression_BG, genes = source.log_normalized()
    pairs = [(strip_version(name), str(column)) for name, column in zip(source.names()[0], source.var.index) if name]
    column_of = dict(reversed(pairs))
    return expression_BG, tuple(genes), tuple(column_of[gene] for gene in genes)
