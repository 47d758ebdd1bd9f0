"""Run generated cases through check, encode, embed and annotate, and compare each with its clean data.

`python tests/fuzz/run.py --n 2000 --seed 0` prints what fails, with the seeds; exit status 1 if anything does.
"""

from __future__ import annotations

import argparse
import hashlib
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
from cases import Case, clean_data, make_case

import scfm
from scfm.errors import ScfmError


@cache
def models() -> dict[str, Any]:
    """Small models with labels, one for each kind of encoding."""
    found = {}
    for kind in ("rank", "bin", "bucket", "continuous"):
        config = scfm.FitConfig(n_steps=1)
        adata = anndata.concat([clean_data(seed) for seed in range(3)])
        adata.obs_names_make_unique()
        found[kind] = scfm.fit(adata, labels_key="type", encoding=kind, config=config, progress=False, baselines=False)
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


def compare(case: Case, clean_seed: int, kind: str) -> str | None:
    """What is wrong with a case; None if it is right."""
    arguments, adata = case.arguments, case.adata
    data: Any = adata if case.path is None else case.path
    want = expected(kind, clean_seed)
    before = state(adata)
    report = scfm.pp.check(data, models()[kind], **arguments)
    try:
        found = tokens(data, kind, arguments)
    except ScfmError as error:
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
    try:
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", module="scfm")
            return case, compare(case, clean_seed, kind)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return case, f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}"


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
