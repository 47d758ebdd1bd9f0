"""Run generated cases through check, encode, embed, annotate and fit, and compare each with its clean data.

`python tests/fuzz/run.py --n 2000 --seed 0` prints what fails, with the seeds; exit status 1 if anything does.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from cases import LAYOUTS, Case, clean_data, make_case

import scfm
from scfm.encoding import make_encoding
from scfm.errors import ScfmError

SETTINGS: dict[str, Any] = {
    "labels_key": "type",
    "config": scfm.FitConfig(n_steps=1),
    "progress": False,
    "baselines": False,
}
EVERY_FIT = 16  # one case in so many is fitted as well


@cache
def models() -> dict[str, Any]:
    """Small models with labels, and encodings of the kinds that no small model has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.concat([clean_data(seed) for seed in range(3)])
        adata.obs_names_make_unique()
    found: dict[str, Any] = {kind: scfm.fit(adata, encoding=kind, **SETTINGS) for kind in ("rank", "bin")}
    for kind in ("bucket", "continuous"):
        found[kind] = make_encoding(kind, adata=adata)
    return found


@cache
def expected(kind: str, seed: int) -> dict[str, Any]:
    adata = clean_data(seed)
    return {"tokens": tokens(adata, kind, {}), **results(adata, kind, {})}


def tokens(data: Any, kind: str, arguments: dict[str, Any]) -> list[Any]:
    cells = scfm.pp.encode(data, models()[kind], **arguments)
    return [
        cells.gene_ids_T.numpy(),
        None if cells.values_T is None else cells.values_T.numpy(),
        cells.cu_seqlens.numpy(),
        None if cells.depth_B is None else cells.depth_B.numpy(),
    ]


def results(adata: anndata.AnnData, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(models()[kind], scfm.Model):
        return {}
    scfm.tl.embed(adata, models()[kind], **arguments)
    others = {name: value for name, value in arguments.items() if name != "depth_key"}
    found = {"embedding": adata.obsm["X_scfm"]}
    if "depth_key" not in arguments:
        scfm.tl.annotate(adata, models()[kind], **others)
        found |= {"labels": list(adata.obs["scfm_label"].astype(str)), "proba": adata.obsm["scfm_proba"]}
    return found


def state(adata: anndata.AnnData) -> str:
    """A digest of all that the tools promise to leave as it is."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if sp.issparse(value):
            for array in (value.data, value.indices, value.indptr):
                add(array)
        elif isinstance(value, np.ma.MaskedArray):
            add(value.filled(-1))
        elif isinstance(value, np.ndarray) and value.dtype.kind != "O":
            digest.update(str((value.dtype, value.shape)).encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, pd.DataFrame):
            kept = value.loc[:, [not str(name).startswith("scfm_") for name in value.columns]]
            digest.update(repr([list(kept.columns), kept.dtypes.astype(str).tolist(), list(kept.index)]).encode())
            digest.update(repr(kept.to_numpy(dtype=object).tolist()).encode())
        else:
            digest.update(repr(value).encode())

    for value in (adata.X, adata.obs, adata.var, *(adata.layers[name] for name in sorted(adata.layers))):
        add(value)
    if adata.raw is not None:
        add(adata.raw.X)
        add(adata.raw.var)
    return digest.hexdigest()


def is_refusal(error: Exception) -> bool:
    """Whether scfm raised the error on purpose, and no library below it."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_own = Path(scfm.__file__).parent in raised_in.parents
    return isinstance(error, ScfmError) or (isinstance(error, ValueError | TypeError) and is_own)


@cache
def fitted(seed: int) -> Any:
    adata = clean_data(seed)
    scfm.fit(adata, **SETTINGS)
    return adata.obsm["X_scfm"]


def compare_fit(case: Case, clean_seed: int) -> str | None:
    """Fit on the data of a case. Genes in another order, or more of them, give another model."""
    adata = case.adata
    before = state(adata)
    arguments = {name: value for name, value in case.arguments.items() if name in ("layer", "gene_key")}
    try:
        scfm.fit(adata, **SETTINGS, **arguments)
    except Exception as error:
        if not is_refusal(error):
            raise
        cannot_select = "columns of obs named by numbers, and twice" in case.steps
        return None if case.is_damaged or cannot_select else f"fit refused: {error}"
    is_same = not case.is_damaged and set(case.steps) <= {*LAYOUTS, "a layer"}
    if is_same and not np.array_equal(adata.obsm["X_scfm"], fitted(clean_seed)):
        return "another fit"
    return None if state(adata) == before else "fit changed the input"


def compare(case: Case, clean_seed: int, kind: str) -> str | None:
    """What is wrong with a case; None if it is right."""
    arguments, adata = case.arguments, case.adata
    data: Any = adata if case.path is None else case.path
    want = expected(kind, clean_seed)
    before = state(adata)
    report = scfm.pp.check(data, models()[kind], **arguments)
    try:
        found = tokens(data, kind, arguments)
    except Exception as error:
        if not is_refusal(error):
            raise
        if report.ok:
            return f"check says ready, encode says {error}"
        return None if case.is_damaged else f"refused: {error}"
    if not report.ok:
        return f"encode works, check says not ready:\n{report}"
    if case.is_damaged:
        return "damaged, and not refused"
    for name, one, other in zip(("tokens", "values", "boundaries", "depths"), found, want["tokens"]):
        if not (one is other is None or np.array_equal(one, other)):
            return f"other {name}"
    if case.path is not None:
        adata = anndata.read_zarr(case.path) if case.path.suffix == ".zarr" else anndata.read_h5ad(case.path)
        before = state(adata)
    adata = adata.copy() if adata.is_view else adata
    for name, values in results(adata, kind, arguments).items():
        if not np.array_equal(values, want[name]):
            return f"other {name}"
    return None if state(adata) == before else "the input was changed"


def run_case(seed: int, folder: Path) -> tuple[Case, str | None]:
    """Run the case of a seed; what is wrong with it, or None."""
    case, clean_seed = make_case(seed, folder)
    kind = list(models())[seed % len(models())]
    expected(kind, clean_seed)
    fitted(clean_seed)
    try:
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", module="scfm")
            wrong = compare(case, clean_seed, kind)
            if wrong is None and seed % EVERY_FIT == 0 and case.path is None:
                wrong = compare_fit(case, clean_seed)
            return case, wrong
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return case, f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}"
    finally:
        if case.path is not None and case.path.suffix == ".h5ad":
            case.path.unlink()
        elif case.path is not None:
            shutil.rmtree(case.path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    steps: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    started, failures = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.n):
            if time.monotonic() - started > options.seconds:
                break
            case, wrong = run_case(seed, Path(folder))
            steps.update(case.steps)
            outcomes["wrong" if wrong else "refused" if case.is_damaged else "equal"] += 1
            if wrong:
                failures += 1
                print(f"seed {seed} ({', '.join(case.steps)}; {case.arguments}): {wrong}", flush=True)
    print(f"{outcomes.total()} cases: " + ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    print("; ".join(f"{name}: {n}" for name, n in steps.most_common()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
