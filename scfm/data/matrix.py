"""`CountMatrix`: the one door through which counts enter, in whatever form AnnData holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scfm.data.counts import check_counts, looks_like_counts, row_totals
from scfm.errors import CountsError

# A block of rows is read, checked and encoded at once: large enough to amortise calls, small enough for the cache of
# a laptop's memory budget (about 100 MB at 3,000 genes a cell).
BLOCK_ROWS = 8192


class CountMatrix:
    """Raw counts of n_obs cells by n_vars genes, read in blocks of CSR rows; never densified, never copied whole.

    Dense arrays, CSR, `h5py` and Zarr backed matrices and views are read a block at a time. CSC (in memory or backed)
    is turned into CSR once, which costs one copy.

    Parameters
    ----------
    matrix
        Anything two-dimensional that gives blocks of rows by slicing.
    var
        One row a gene; its index and columns name the genes.
    depth
        Total counts of each cell where the matrix does not hold all genes, shape (n_obs,); None to sum the rows.
    name
        What to call the matrix in errors.
    elsewhere
        Other places of the same AnnData, name to matrix, searched for counts when an error must say where they hide.

    Examples
    --------
    >>> import scfm
    >>> counts = scfm.data.CountMatrix.from_adata(scfm.datasets.pbmc())
    >>> [(first, block.shape[0]) for first, block, depth_B in counts.blocks(400)]
    [(0, 400), (400, 300)]
    """

    def __init__(
        self,
        matrix: Any,
        *,
        var: pd.DataFrame | None = None,
        depth: ArrayLike | None = None,
        name: str = "the matrix",
        elsewhere: Mapping[str, Any] | None = None,
    ) -> None:
        if len(getattr(matrix, "shape", ())) != 2:
            raise CountsError(f"{name} is {type(matrix).__name__}, not a matrix of cells by genes.")
        self._matrix = _row_readable(matrix)
        self.name = name
        self.n_obs, self.n_vars = map(int, self._matrix.shape)
        self.var = pd.DataFrame(index=pd.RangeIndex(self.n_vars).astype(str)) if var is None else var
        self._elsewhere = dict(elsewhere or {})
        self._depth = None if depth is None else _valid_depth(depth, self.n_obs, name)

    @classmethod
    def from_adata(cls, adata: Any, *, layer: str | None = None, depth_key: str | None = None) -> CountMatrix:
        """Open the counts of an AnnData.

        Parameters
        ----------
        adata
            In memory, backed, or a view.
        layer
            Name in `adata.layers`; "raw" for `adata.raw` (with its own genes); None for `adata.X`.
        depth_key
            Column of `adata.obs` with the total counts of each cell over all genes measured, for a matrix that holds
            only some of them. Where None, `adata.uns["scfm"]["depth_key"]` names it, if there is one; without, rows
            are summed.

        Raises
        ------
        CountsError
            If `layer` or `depth_key` is not there, or the depths are not positive numbers.
        TypeError
            If `adata` is no AnnData.
        """
        require_adata(adata)
        matrix, var, name = _find_matrix(adata, layer)
        elsewhere = {f'layer="{key}"': adata.layers[key] for key in adata.layers if key != layer}
        if adata.raw is not None and name != "adata.raw.X":
            elsewhere['layer="raw" (adata.raw)'] = adata.raw.X
        if layer is not None and adata.X is not None:
            elsewhere["layer=None (adata.X)"] = adata.X
        if depth_key is None:
            depth_key = dict(adata.uns.get("scfm", {})).get("depth_key")
        depth = None if depth_key is None else _depth_column(adata.obs, depth_key)
        return cls(matrix, var=var, depth=depth, name=name, elsewhere=elsewhere)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_obs, self.n_vars

    @property
    def named_depth(self) -> NDArray[np.float64] | None:
        """Total counts of each cell where the data name them, shape (n_obs,); None where rows are summed."""
        return self._depth

    @property
    def in_memory_csr(self) -> bool:
        """Whether rows are read without any copy."""
        return sp.issparse(self._matrix)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Read rows start..stop as CSR, unchecked; shares memory with the source where that is CSR."""
        if sp.issparse(self._matrix):
            return _csr_rows(self._matrix, start, stop)
        block = self._matrix[start:stop]
        if hasattr(block, "compute"):  # dask
            block = block.compute()
        block = sp.csr_matrix(block)
        return block if block.dtype.isnative else block.astype(block.dtype.newbyteorder("="))

    def blocks(
        self, rows: int = BLOCK_ROWS, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, sp.csr_matrix, NDArray[np.float64]]]:
        """Read in blocks: first row, its checked CSR counts, and the total counts of its cells (float64).

        Raises
        ------
        CountsError
            At the first block with a negative, infinite or fractional number; says where counts may be found.
        """
        stop = self.n_obs if stop is None else stop
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            block = self.rows(first, last)
            self.check(block)
            yield first, block, self._depth[first:last] if self._depth is not None else row_totals(block)

    def depth(self) -> NDArray[np.float64]:
        """Total counts of every cell over all genes measured, shape (n_obs,), float64."""
        if self._depth is not None:
            return self._depth
        return np.concatenate([depth for _, _, depth in self.blocks()]) if self.n_obs else np.zeros(0)

    def check(self, block: sp.csr_matrix) -> None:
        """Raise `CountsError` unless `block` holds raw counts."""
        check_counts(block, name=self.name, advice=self._advice)

    def places_with_counts(self) -> list[str]:
        """Where else in the AnnData raw counts seem to be, judged by the first rows."""
        return [place for place, matrix in self._elsewhere.items() if looks_like_counts(matrix)]

    def _advice(self) -> str:
        places = self.places_with_counts()
        if places:
            return f"Raw counts seem to be in {' and '.join(places)}: pass that."
        searched = ", ".join(self._elsewhere) or "there are no layers and no `raw`"
        return (
            f"No raw counts were found elsewhere ({searched}). Load the unnormalised matrix, keep it as "
            '`adata.layers["counts"]`, and pass `layer="counts"`.'
        )


def require_adata(adata: Any) -> None:
    """Raise `TypeError` for what is no AnnData: a path, a matrix, a data frame, or two arguments in the wrong order."""
    if not hasattr(adata, "obs_names"):
        raise TypeError(
            f"`adata` is a {type(adata).__name__}, not an AnnData. Read a file with `anndata.read_h5ad(path)`, or wrap a "
            "matrix of cells by genes in `anndata.AnnData(matrix)` and set `var_names`."
        )


def no_matrix(data: str, place: str, layers: Sequence[str], *, has_raw: bool) -> str:
    """Say that `data` has nothing at `place`, and what to do with what there is."""
    others = [*(f'layer="{name}"' for name in sorted(layers)), *(['layer="raw"'] if has_raw else [])]
    cure = f"Pass one of {', '.join(others)}." if others else "There is no layer and no `raw` either: load the counts."
    return f"{data} has no {place}, where counts were to be. {cure}"


def _row_readable(matrix: Any) -> Any:
    """Return `matrix` in a form whose blocks of rows are cheap to read."""
    if isinstance(matrix, pd.DataFrame):
        return matrix.to_numpy()
    if sp.issparse(matrix):
        matrix = matrix if matrix.format == "csr" else matrix.tocsr()
        _check_pointers(matrix.indptr, len(matrix.data))
        return matrix
    if getattr(matrix, "format", None) == "csc":  # backed CSC: a block of rows would read the whole file each time
        return matrix.to_memory().tocsr()
    return np.asarray(matrix) if isinstance(matrix, np.matrix) else matrix


def _check_pointers(indptr: NDArray[np.integer], n_entries: int) -> None:
    if indptr[0] != 0 or indptr[-1] != n_entries or (indptr[1:] < indptr[:-1]).any():
        raise CountsError(
            f"The row pointers ({indptr.dtype}) of the sparse matrix do not rise from 0 to its {n_entries} entries. "
            "More than 2^31 - 1 entries need int64 pointers: build the matrix with `indptr` and `indices` of int64."
        )


def _csr_rows(matrix: sp.csr_matrix, start: int, stop: int) -> sp.csr_matrix:
    """Slice rows without copying data or indices (scipy's own slicing copies both)."""
    if start == 0 and stop == matrix.shape[0]:
        return matrix
    first, last = matrix.indptr[start], matrix.indptr[stop]
    block = sp.csr_matrix((stop - start, matrix.shape[1]), dtype=matrix.dtype)
    block.data, block.indices = matrix.data[first:last], matrix.indices[first:last]
    block.indptr = matrix.indptr[start : stop + 1] - first
    return block


def _find_matrix(adata: Any, layer: str | None) -> tuple[Any, pd.DataFrame, str]:
    if layer is None:
        if adata.X is None:
            raise CountsError(no_matrix("adata", "X", list(adata.layers), has_raw=adata.raw is not None))
        return adata.X, adata.var, "adata.X"
    if layer in adata.layers:
        return adata.layers[layer], adata.var, f'adata.layers["{layer}"]'
    if layer == "raw" and adata.raw is not None:
        return adata.raw.X, adata.raw.var, "adata.raw.X"
    raise CountsError(
        f"`layer` is {layer!r}, which is not there. Layers: {sorted(adata.layers) or 'none'}; "
        f"`adata.raw`: {'present, layer=' + repr('raw') if adata.raw is not None else 'none'}."
    )


def _depth_column(obs: pd.DataFrame, key: str) -> NDArray[np.float64]:
    if key not in obs:
        raise CountsError(
            f"`depth_key` is {key!r}, which is not in `adata.obs` ({', '.join(map(str, obs.columns[:8])) or 'empty'}). "
            "Pass the column that holds each cell's total counts, or None to sum the rows."
        )
    return pd.to_numeric(obs[key], errors="coerce").to_numpy(dtype=np.float64)


def _valid_depth(depth: ArrayLike, n_obs: int, name: str) -> NDArray[np.float64]:
    depth_B = np.ascontiguousarray(depth, dtype=np.float64)
    if depth_B.shape != (n_obs,):
        raise CountsError(f"The depths have shape {depth_B.shape}; {name} has {n_obs} cells.")
    wrong = ~(np.isfinite(depth_B) & (depth_B >= 0))
    if wrong.any():
        raise CountsError(
            f"{int(wrong.sum())} of {n_obs} depths are negative or not numbers (cell {int(wrong.argmax())}: "
            f"{depth_B[wrong.argmax()]}). Total counts must be finite and not negative."
        )
    return depth_B
