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
import torch
from cases import Case, clean_data, make_case

import scfm
from scfm.encoding import make_encoding
from scfm.errors import ScfmError
from scfm.families import choose_preset

EVERY_FIT = 4  # one case in so many is fitted as well
# Genes that a new model has, or has in another order, than on the clean data.
OTHER_GENES = {"another order", "symbols in var_names and the ids in a column of CELLxGENE"}
# This does not damage a new model, which learns the genes of the data.
FITTED_DAMAGES = {"genes of a mouse", "a gene twice"}
FILE_DAMAGE = "another number of cells"  # of the file, not of the data that it was written from
SHORT = scfm.FitConfig(n_steps=1)
SETTINGS: dict[str, Any] = {"config": SHORT, "progress": False, "baselines": False}
# The network of a family at its smallest.
SMALL = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16}
PRESETS = {"bucket": "scbert", "continuous": "scfoundation"}


@cache
def models() -> dict[str, scfm.Model]:
    """Return a small annotator for every encoding."""
    adata = anndata.concat([clean_data(seed) for seed in range(3)], index_unique="-")
    found = {}
    for kind in ("rank", "bin", *PRESETS):
        preset = choose_preset(PRESETS.get(kind, "small"), encoding=kind)
        encoding = make_encoding(scfm.EncodingConfig(**preset.encoding), adata=adata)
        n_tokens = len(encoding.vocabulary)
        sizes = SMALL | {"context_length": encoding.config.context_length or n_tokens}
        torch.manual_seed(0)
        config = preset.model_config(n_tokens=n_tokens, pad_id=encoding.vocabulary.pad_id, **sizes)
        network = scfm.models.CellTransformer.for_vocabulary(config, encoding.vocabulary)
        model = scfm.Model(network, encoding, objective=preset.objective)
        found[kind] = scfm.fit(adata, model=model, labels_key="type", **SETTINGS)
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


def is_refusal(error: Exception) -> bool:
    """Whether scfm raised the error on purpose, and no library below it."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_own = Path(scfm.__file__).parent in raised_in.parents
    return isinstance(error, ScfmError) or (isinstance(error, ValueError | TypeError) and is_own)


def fit(adata: anndata.AnnData, kind: str, arguments: dict[str, Any], *, is_labeled: bool) -> Any:
    """Fit a new model, or a copy of one that only its preset makes, with or without labels; return the embedding."""
    source: dict[str, Any] = {"model": models()[kind]} if kind in PRESETS else {"encoding": kind, "preset": "small"}
    stage = {"labels_key": "type", "pretrain_config": SHORT if kind not in PRESETS else None} if is_labeled else {}
    scfm.fit(adata, **SETTINGS, **source, **stage, **arguments)
    return adata.obsm["X_scfm"]


@cache
def fitted(clean_seed: int, kind: str, is_labeled: bool) -> Any:
    return fit(clean_data(clean_seed), kind, {}, is_labeled=is_labeled)


def compare_fit(case: Case, clean_seed: int, kind: str, *, is_labeled: bool) -> str | None:
    """Fit on the data of a case. A new model has the genes of the data, in their order."""
    adata = case.adata
    before = state(adata)
    try:
        found = fit(adata, kind, case.arguments, is_labeled=is_labeled)
    except Exception as error:
        if not is_refusal(error):
            raise
        return None if case.is_damaged else f"fit refused: {error}"
    if case.is_damaged and not set(case.steps) & FITTED_DAMAGES:
        return "damaged, and fitted"
    has_same_genes = not case.is_damaged and (kind in PRESETS or not set(case.steps) & OTHER_GENES)
    if has_same_genes and not np.array_equal(found, fitted(clean_seed, kind, is_labeled)):
        return "another fit"
    return None if state(adata) == before else "fit changed the input"


def compare(case: Case, clean_seed: int, kind: str, folder: Path) -> str | None:
    """What is wrong with a case; None if it is right."""
    arguments, data = case.arguments, case.adata if case.path is None else case.path
    want = expected(kind, clean_seed)
    before = state(case.adata)
    report = scfm.pp.check(data, models()[kind], **arguments)
    try:
        found = tokens(data, kind, arguments)
    except Exception as error:
        if not is_refusal(error):
            raise
        if report.ok:
            return f"check says ready, encode says {error}"
        return embedded_anyway(case, kind, folder) if case.is_damaged else f"refused: {error}"
    if not report.ok:
        return f"encode works, check says not ready:\n{report}"
    if case.is_damaged:
        return "damaged, and not refused"
    for name, one, other in zip(("tokens", "values", "boundaries", "depths"), found, want["tokens"]):
        if not (one is other is None or np.array_equal(one, other)):
            return f"other {name}"
    if case.path is not None:
        if not np.array_equal(embedding_of_file(case.path, kind, arguments, folder), want["embedding"]):
            return "other embedding of the file"
        case.adata = anndata.read_zarr(case.path) if case.path.suffix == ".zarr" else anndata.read_h5ad(case.path)
        before = state(case.adata)
    case.adata = case.adata.copy() if case.adata.is_view else case.adata
    for name, values in results(case.adata, kind, arguments).items():
        if not np.array_equal(values, want[name]):
            return f"other {name}"
    return None if state(case.adata) == before else "the input was changed"


def embedding_of_file(path: Path, kind: str, arguments: dict[str, Any], folder: Path) -> Any:
    out = folder / "embedding.npy"
    scfm.tl.embed_files(path, out, models()[kind], progress=False, **arguments)
    found = np.load(out)
    out.unlink()
    return found


def embedded_anyway(case: Case, kind: str, folder: Path) -> str | None:
    """Whether damaged data that `encode` refuses are embedded, or changed by the attempt; None if they are not."""
    adata = case.adata.copy() if case.adata.is_view else case.adata
    before = state(adata)
    try:
        if case.path is None:
            scfm.tl.embed(adata, models()[kind], **case.arguments)
        else:
            embedding_of_file(case.path, kind, case.arguments, folder)
    except Exception as error:
        if not is_refusal(error):
            raise
        return None if state(adata) == before else "a refusal changed the input"
    return "damaged, and embedded"


def run_case(seed: int, folder: Path, *, fits: int = EVERY_FIT) -> tuple[Case, str | None]:
    """Run the case of a seed; what is wrong with it, or None."""
    case, clean_seed = make_case(seed, folder)
    kind = list(models())[seed % len(models())]
    is_fitted, is_labeled = seed // 4 % fits == 0, seed // 4 // fits % 2 == 0
    expected(kind, clean_seed)
    if is_fitted:
        fitted(clean_seed, kind, is_labeled)
    try:
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", module="scfm")
            wrong = compare(case, clean_seed, kind, folder)
            if wrong is None and is_fitted and FILE_DAMAGE not in case.steps:
                wrong = compare_fit(case, clean_seed, kind, is_labeled=is_labeled)
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
    parser.add_argument("--fits", type=int, default=EVERY_FIT, help="fit one case in so many")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    steps: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    started, failures = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.n):
            if time.monotonic() - started > options.seconds:
                break
            case, wrong = run_case(seed, Path(folder), fits=options.fits)
            steps.update(case.steps)
            outcomes["wrong" if wrong else "refused" if case.is_damaged else "equal"] += 1
            if wrong:
                failures += 1
                print(f"seed {seed} ({', '.join(case.steps)}; {case.arguments}): {wrong}", flush=True)
            if outcomes.total() % 250 == 0:
                print(f"{outcomes.total()} cases, next seed {seed + 1}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{outcomes.total()} cases: " + ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    print("; ".join(f"{name}: {n}" for name, n in steps.most_common()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
