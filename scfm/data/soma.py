"""Cells of a TileDB-SOMA experiment, with the attributes of an AnnData that `CountSource` needs.

tiledbsoma-ml, which loads batches for torch, is not used: it shuffles and divides cells itself, and cannot go to a position.
"""

# Axes: B cells of a block.

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm._remote import SomaPath

ROW_ID = "soma_joinid"
NAMES = ("obs_id", "var_id", "feature_id")  # columns with the names of cells and genes


class SomaData:
    """An experiment, or the cells of it that a filter selects; tables and counts are read when they are needed.

    Attributes
    ----------
    obs, var
        Tables of cells and genes.
    X
        The layer "raw" (as in the CELLxGENE Census), or "data", or the only layer.
    layers
        All layers by name.
    """

    raw: Any = None

    def __init__(self, path: SomaPath) -> None:
        self.label = path.name
        self.uns: dict[str, Any] = {}
        experiment = path.experiment()
        if path.measurement not in experiment.ms:
            raise OSError(
                f"{path.uri} has no measurement {path.measurement!r}. It has {', '.join(experiment.ms)}: add "
                "`?measurement=NAME` to the URL."
            )
        measurement = experiment.ms[path.measurement]
        self.obs = SomaTable(experiment, experiment.obs, path.obs_filter)
        self.var = SomaTable(experiment, measurement.var)
        self.n_obs, self.n_vars = len(self.obs), len(self.var)
        self.layers = {
            name: SomaMatrix(experiment, measurement.X[name], self.obs.ids, self.var.ids) for name in measurement.X
        }
        first = next((name for name in ("raw", "data") if name in self.layers), None)
        self.X = self.layers[first] if first else next(iter(self.layers.values())) if len(self.layers) == 1 else None

    @property
    def obs_names(self) -> pd.Index:
        return self.obs.index


class SomaTable:
    """`obs` or `var` of an experiment; columns are read one by one.

    Attributes
    ----------
    ids
        Identifier of each row in the experiment, ascending, shape (rows,), int64.
    """

    def __init__(self, experiment: Any, table: Any, value_filter: str | None = None) -> None:
        self._experiment = experiment  # when it is collected, its tables are closed
        self._table, self._filter = table, value_filter
        self.ids: NDArray[np.int64] = np.sort(self._read([ROW_ID])[ROW_ID].to_numpy())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def columns(self) -> list[str]:
        return [name for name in self._table.keys() if name != ROW_ID]  # noqa: SIM118

    @cached_property
    def index(self) -> pd.Index:
        name = next((name for name in NAMES if name in self.columns), None)
        return pd.Index(self.ids.astype(str) if name is None else self.read_column(name).astype(str), dtype=object)

    def read_column(self, name: str) -> pd.Series:
        return self._read([ROW_ID, name]).sort_values(ROW_ID)[name].reset_index(drop=True)

    def to_memory(self) -> pd.DataFrame:
        table = self._read([ROW_ID, *self.columns]).sort_values(ROW_ID).drop(columns=ROW_ID)
        return table.set_index(self.index)

    def _read(self, names: list[str]) -> pd.DataFrame:
        import tiledbsoma

        try:
            table: pd.DataFrame = self._table.read(column_names=names, value_filter=self._filter).concat().to_pandas()
        except (tiledbsoma.SOMAError, SyntaxError, ValueError) as error:
            raise OSError(
                f"The filter {self._filter!r} on `obs` of {self._table.uri} cannot be applied ({error})."
            ) from error
        return table


class SomaMatrix:
    """A sparse layer of an experiment, of which blocks of rows are read.

    Parameters
    ----------
    experiment, array
        The experiment, which is kept open, and the layer.
    obs_ids, var_ids
        Identifiers of rows and columns, ascending.
    """

    def __init__(self, experiment: Any, array: Any, obs_ids: NDArray[np.int64], var_ids: NDArray[np.int64]) -> None:
        self._experiment, self._array, self._obs_ids, self._var_ids = experiment, array, obs_ids, var_ids
        self.shape = len(obs_ids), len(var_ids)

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        if not getattr(self._array, "is_sparse", False):
            raise OSError(f"{self._array.uri} is dense; scfm reads sparse layers of SOMA experiments.")
        ids = self._obs_ids[rows]
        shape = len(ids), self.shape[1]
        if not len(ids):
            return sp.csr_matrix(shape, dtype=np.float32)
        is_run = ids[-1] - ids[0] + 1 == len(ids)
        coords = (slice(int(ids[0]), int(ids[-1])) if is_run else ids,)  # both ends of a slice are included
        table = self._array.read(coords=coords).tables().concat()
        row_N, column_N, values_N = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        places = np.searchsorted(ids, row_N), np.searchsorted(self._var_ids, column_N)
        return sp.csr_matrix((values_N, places), shape=shape)
