"""A seeded generator of AnnData that hold the same counts in many forms, or something that is not counts.

Every case is a clean data set and one of its many other forms. A form is right if it gives what the clean data give; a
damaged one is right if it is refused with an error of `scfm.errors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

N_CELLS, N_GENES = 24, 40
NAMES = [f"ENSG{100_000 + 37 * gene:011d}" for gene in range(N_GENES)]
TYPES = np.array(["B cell", "NK cell", "T cell"])[np.arange(N_CELLS) % 3]


def clean_counts(seed: int) -> np.ndarray:
    """Counts of cells of three types, each with its genes; every cell has some."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.5, 1.5, N_GENES) * np.exp(0.6 * rng.normal(size=(3, N_GENES))) + 0.05
    counts = rng.poisson(mean[np.arange(N_CELLS) % 3])
    counts[:, 0] += 1
    return np.minimum(counts, 100)  # so that a signed byte holds them


def clean_data(seed: int) -> anndata.AnnData:
    adata = anndata.AnnData(sp.csr_matrix(clean_counts(seed).astype(np.float32)), var=pd.DataFrame(index=NAMES))
    adata.obs_names = [f"cell{i}" for i in range(N_CELLS)]
    adata.obs["type"] = pd.Categorical(TYPES)
    return adata


@dataclass
class Case:
    """Data in some form, how to read them, and whether they must be refused."""

    adata: anndata.AnnData
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    is_damaged: bool = False
    path: Path | None = None


Step = Callable[[Case, np.random.Generator], None]


def step(table: dict[str, Step], name: str) -> Callable[[Step], Step]:
    def add(function: Step) -> Step:
        table[name] = function
        return function

    return add


LAYOUTS: dict[str, Step] = {}
NAMINGS: dict[str, Step] = {}
EXTRAS: dict[str, Step] = {}
PLACES: dict[str, Step] = {}
DAMAGES: dict[str, Step] = {}

INTEGERS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i2", ">i4", ">u8"]
FLOATS = ["f2", "f4", "f8", ">f4", ">f8", "g"]


# Layouts: what X is.


def dense(case: Case) -> np.ndarray:
    return case.adata.X.toarray() if sp.issparse(case.adata.X) else np.asarray(case.adata.X)


@step(LAYOUTS, "dense")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.X = dense(case).astype(rng.choice(INTEGERS + FLOATS))


@step(LAYOUTS, "dense by columns")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.X = np.asfortranarray(dense(case).astype(rng.choice(["i4", "f4", "f8"])))


@step(LAYOUTS, "a masked array without masked values")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.X = np.ma.array(dense(case), mask=False)


def sparse(case: Case, rng: np.random.Generator, kind: type) -> Any:
    matrix = kind(dense(case))
    matrix.data = matrix.data.astype(rng.choice(INTEGERS + FLOATS))
    if rng.random() < 0.5:
        matrix.indices = matrix.indices.astype(rng.choice(["i4", "i8", "u4", "u8", ">i4"]))
        matrix.indptr = matrix.indptr.astype(rng.choice(["i4", "i8", "u4", "u8"]))
    return matrix


for _kind in (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array):

    @step(LAYOUTS, _kind.__name__)
    def _(case: Case, rng: np.random.Generator, kind: type = _kind) -> None:
        case.adata.X = sparse(case, rng, kind)


@step(LAYOUTS, "entries in any order")
def _(case: Case, rng: np.random.Generator) -> None:
    matrix = sp.csr_matrix(dense(case))
    for start, stop in zip(matrix.indptr, matrix.indptr[1:]):
        order = start + rng.permutation(stop - start)
        matrix.data[start:stop], matrix.indices[start:stop] = matrix.data[order], matrix.indices[order]
    case.adata.X = matrix


@step(LAYOUTS, "counts in parts")
def _(case: Case, rng: np.random.Generator) -> None:
    matrix = sp.csr_matrix(dense(case))
    half = (matrix.data / 2).astype(rng.choice(["f4", "f8"]))
    matrix.data, matrix.indices = np.repeat(half, 2), np.repeat(matrix.indices, 2)
    matrix.indptr = 2 * matrix.indptr
    case.adata.X = matrix


@step(LAYOUTS, "explicit zeros")
def _(case: Case, rng: np.random.Generator) -> None:
    counts = dense(case)
    matrix = sp.csr_matrix(np.ones_like(counts))
    matrix.data = counts.ravel()
    case.adata.X = matrix


@step(LAYOUTS, "a view")
def _(case: Case, rng: np.random.Generator) -> None:
    adata = case.adata
    rows, columns = rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)
    shuffled = adata[rows, columns].copy()
    case.adata = shuffled[np.argsort(rows), np.argsort(columns)]


# Namings: what the genes are called, and where.


@step(NAMINGS, "versions")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.var_names = [f"{name}.{rng.integers(1, 20)}" for name in case.adata.var_names]


@step(NAMINGS, "a column of strings, objects or categories")
def _(case: Case, rng: np.random.Generator) -> None:
    adata = case.adata
    adata.var["id"] = pd.Series(
        list(adata.var_names), index=adata.var_names, dtype=rng.choice(["object", "string", "category"])
    )
    adata.var_names = [f"row {i}" for i in range(adata.n_vars)]
    case.arguments["gene_key"] = "id"


@step(NAMINGS, "symbols in var_names and the ids in a column of CELLxGENE")
def _(case: Case, rng: np.random.Generator) -> None:
    adata = case.adata
    adata.var["feature_id"] = list(adata.var_names)
    adata.var_names = [f"SYN{i}A" for i in range(adata.n_vars)]


@step(NAMINGS, "another order")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata = case.adata[:, rng.permutation(case.adata.n_vars)].copy()


# Extras: what else an AnnData may hold.


@step(EXTRAS, "antibodies")
def _(case: Case, rng: np.random.Generator) -> None:
    adata = case.adata
    names = [f"CD{i}_TotalSeqB" for i in range(5)]
    counts = np.hstack([dense(case), rng.poisson(50, (adata.n_obs, 5)).astype(np.float32)])
    joined = anndata.AnnData(sp.csr_matrix(counts), obs=adata.obs.copy(), uns=adata.uns)
    joined.var = adata.var.reindex([*adata.var_names, *names])
    kinds = np.array(["Gene Expression"] * adata.n_vars + ["Antibody Capture"] * 5)
    joined.var["feature_types"] = pd.Categorical(kinds) if rng.random() < 0.5 else kinds
    if "gene_key" in case.arguments:
        joined.var["id"] = joined.var["id"].astype(object).where(joined.var["id"].notna(), None)
    case.adata = joined


@step(EXTRAS, "columns of obs named by numbers, and twice")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.obs[0] = 1.5
    case.adata.obs.insert(0, "twice", 1)
    case.adata.obs.insert(0, "twice", 2, allow_duplicates=True)


@step(EXTRAS, "uns of others")
def _(case: Case, rng: np.random.Generator) -> None:
    contents: list[Any] = ["text", 3, {"depth_key": 3}, {"other": "tool"}]
    case.adata.uns["scfm"] = contents[rng.integers(len(contents))]


@step(EXTRAS, "depths")
def _(case: Case, rng: np.random.Generator) -> None:
    totals = np.asarray(dense(case)).astype(float).sum(1)
    if "antibodies" in case.steps:
        totals = np.asarray(dense(case))[:, :N_GENES].astype(float).sum(1)
    case.adata.obs["total"] = pd.array(totals.astype(int), dtype=rng.choice(["Int64", "int64", "float32", "object"]))
    case.arguments["depth_key"] = "total"


@step(EXTRAS, "names of cells that repeat")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.obs_names = ["cell"] * case.adata.n_obs


# Places: where the counts are.


@step(PLACES, "a layer")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.layers["counts"] = case.adata.X
    case.adata.X = np.log1p(dense(case).astype(np.float64))
    case.arguments["layer"] = "counts"


@step(PLACES, "raw, with more genes in another order")
def _(case: Case, rng: np.random.Generator) -> None:
    full = case.adata.copy()
    some = full[:, rng.permutation(full.n_vars)[: full.n_vars // 2]].copy()
    some.raw = full
    some.X = np.log1p(np.asarray(some.X.toarray() if sp.issparse(some.X) else some.X, dtype=np.float64))
    case.adata, case.arguments["layer"] = some, "raw"


# Damages: what must be refused.


def rename(case: Case, change: Callable[[list[str]], list[str]]) -> None:
    """Change the names of the genes wherever they are."""
    case.adata.var_names = change(list(case.adata.var_names))
    for column in case.adata.var.columns:
        case.adata.var[column] = change([str(name) for name in case.adata.var[column]])


def replace_some(case: Case, value: float, rng: np.random.Generator) -> None:
    matrix = sp.csr_matrix(dense(case).astype(np.float64))
    matrix.data[rng.integers(len(matrix.data))] = value
    case.adata.X = matrix if rng.random() < 0.5 else matrix.toarray()


for _name, _value in (
    ("a negative", -1.0), ("a fraction", 0.5), ("NaN", np.nan), ("infinity", np.inf), ("1e300", 1e300),
):  # fmt: skip

    @step(DAMAGES, _name)
    def _(case: Case, rng: np.random.Generator, value: float = _value) -> None:
        replace_some(case, value, rng)


@step(DAMAGES, "a column index out of range")
def _(case: Case, rng: np.random.Generator) -> None:
    matrix = sp.csr_matrix(dense(case))
    matrix.indices[rng.integers(len(matrix.indices))] = rng.choice([-3, 10**6])
    case.adata.X = matrix


@step(DAMAGES, "row pointers that fall")
def _(case: Case, rng: np.random.Generator) -> None:
    matrix = sp.csr_matrix(dense(case))
    matrix.indptr[3] = 10**8
    case.adata.X = matrix


@step(DAMAGES, "masked values")
def _(case: Case, rng: np.random.Generator) -> None:
    counts = np.ma.array(dense(case), mask=False)
    counts[rng.integers(N_CELLS)] = np.ma.masked
    case.adata.X = counts


@step(DAMAGES, "objects")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.X = dense(case).astype(object)


@step(DAMAGES, "a cell without counts")
def _(case: Case, rng: np.random.Generator) -> None:
    counts = dense(case).copy()
    counts[rng.integers(N_CELLS)] = 0
    case.adata.X = sp.csr_matrix(counts) if rng.random() < 0.5 else counts


@step(DAMAGES, "genes of a mouse")
def _(case: Case, rng: np.random.Generator) -> None:
    rename(case, lambda names: [name.replace("ENSG", "ENSMUSG") for name in names])


@step(DAMAGES, "a gene twice")
def _(case: Case, rng: np.random.Generator) -> None:
    rename(case, lambda names: [names[1], *names[1:]])


@step(DAMAGES, "no gene has a name")
def _(case: Case, rng: np.random.Generator) -> None:
    case.adata.var["id"] = pd.Series([None] * case.adata.n_vars, index=case.adata.var_names, dtype=object)
    case.arguments["gene_key"] = "id"


for _argument in ("gene_key", "depth_key", "layer"):

    @step(DAMAGES, f"{_argument} that is not there")
    def _(case: Case, rng: np.random.Generator, argument: str = _argument) -> None:
        case.arguments[argument] = "nowhere"


@step(DAMAGES, "depths that are dates, texts, negative, zero, missing or 1e300")
def _(case: Case, rng: np.random.Generator) -> None:
    n = case.adata.n_obs
    columns: list[Any] = [
        pd.date_range("2020-01-01", periods=n), ["many"] * n, -np.ones(n), np.zeros(n), [None] * n, [True] * n, np.full(n, 1e300),
    ]  # fmt: skip
    case.adata.obs["total"] = pd.Series(columns[rng.integers(len(columns))], index=case.adata.obs_names)
    case.arguments["depth_key"] = "total"


def make_case(seed: int, folder: Path) -> tuple[Case, int]:
    """The case of a seed, and the seed of the clean data that it comes from."""
    rng = np.random.default_rng(seed)
    clean_seed = int(rng.integers(6))
    case = Case(clean_data(clean_seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rng.random() < 0.5:
            _apply(case, NAMINGS, rng)
        if rng.random() < 0.25:
            _apply(case, DAMAGES, rng)
            case.is_damaged = True
        else:
            for _ in range(rng.integers(3)):
                _apply(case, EXTRAS, rng)
            if rng.random() < 0.8:
                _apply(case, LAYOUTS, rng)
        if rng.random() < 0.3 and not case.is_damaged:
            _apply(case, PLACES, rng)
        if rng.random() < 0.4:
            _write(case, rng, folder / f"case{seed}")
    return case, clean_seed


def _apply(case: Case, table: dict[str, Step], rng: np.random.Generator) -> None:
    name = list(table)[rng.integers(len(table))]
    if name in case.steps:
        return
    if case.adata.is_view:
        case.adata = case.adata.copy()
    try:
        table[name](case, rng)
    except Exception:
        if table is PLACES or name == "a view":
            return  # scipy and anndata cannot copy every dtype, or columns of one name
        raise
    case.steps.append(name)


def _write(case: Case, rng: np.random.Generator, stem: Path) -> None:
    """Write the case to a file, if anndata can; some forms exist in memory alone, or are others in a file."""
    if isinstance(case.adata.X, np.ma.MaskedArray) or case.adata.obs.get("total", pd.Series([0])).dtype == object:
        return
    # A folder of zarr takes ten times as long as a file.
    kind = rng.choice(["h5ad", "h5ad gzip", "nullable h5ad", "zarr"], p=[0.3, 0.3, 0.3, 0.1])
    path = stem.with_suffix(".zarr" if kind == "zarr" else ".h5ad")
    try:
        adata = case.adata.copy()
        if kind.startswith("nullable"):
            adata.obs.index = pd.Index(adata.obs_names, dtype="string")
            adata.var.index = pd.Index(adata.var_names, dtype="string")
        with anndata.settings.override(allow_write_nullable_strings=True):
            if kind == "zarr":
                adata.write_zarr(path)
            else:
                adata.write_h5ad(path, compression="gzip" if "gzip" in kind else None)
    except Exception:
        return
    case.path = path
    case.steps.append(kind)
    if case.is_damaged or rng.random() < 0.9 or kind == "zarr":
        return
    with h5py.File(path, "r+") as file:
        length = N_CELLS + rng.choice([-3, 3])
        del file["obs"]
        anndata.io.write_elem(file, "obs", pd.DataFrame(index=[f"c{i}" for i in range(length)]))
    case.is_damaged = True
    case.steps.append("another number of cells")
