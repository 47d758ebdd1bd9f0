"""Every function gives the same where numpy raises, warnings are errors, nothing may be written at home, and the locale is C."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What libraries below scfm warn of at import or use, and scfm cannot change.
THIRD_PARTY = (
    "torch",
    "lightning",
    "anndata",
    "scanpy",
    "scipy",
    "sklearn",
    "pandas",
    "numba",
    "zarr",
    "xarray",
    "importlib",
    "pkg_resources",
)

START = """
import hashlib, json, os, sys, warnings
from pathlib import Path
strict, folder, ignored = sys.argv[1] == "strict", Path(sys.argv[2]), sys.argv[3].split(",")
if strict:
    warnings.resetwarnings()
    warnings.simplefilter("error")
    for module in ignored:
        warnings.filterwarnings("ignore", module=module)
import numpy as np
import torch
import scfm
import scfm.datasets
torch.set_num_threads(1)
if strict:
    np.seterr(all="raise")
"""

JOB = """
adata = scfm.datasets.pbmc()[:120].copy()
adata.obs["bulk_labels"] = adata.obs["bulk_labels"].astype(str).where(lambda label: label.isin(["CD19+ B", "Dendritic"]), "other \\u03b3\\u03b4")
config = scfm.FitConfig(n_steps=1, tokens_per_step=1024)
model = scfm.fit(adata, labels_key="bulk_labels", context_length=64, config=config, pretrain_config=config, progress=False)
model.report()
model.save(folder / "model")
model = scfm.load(folder / "model")
assert scfm.pp.check(adata, model).ok
scfm.tl.annotate(adata, model)
scfm.tl.embed(adata, model)
table = scfm.tl.perturb(adata[:10].copy(), model, genes=["CD74", "LYZ"], n_bootstrap=20, progress=False)
adata.write_h5ad(folder / "out.h5ad")
parts = {
    "id": model.id,
    "labels": "|".join(adata.obs["scfm_label"].astype(str)),
    "embedding": hashlib.sha256(adata.obsm["X_scfm"].tobytes()).hexdigest(),
    "table": table.to_json(double_precision=15),
}
Path(folder / "result.json").write_text(json.dumps(parts), encoding="utf-8")
"""

# Every function of the table of tests/test_inputs_stay.py: what it returns and what it writes.
EVERY_CALL = """
import matplotlib
matplotlib.use("agg")
sys.path.insert(0, sys.argv[4])
import test_inputs_stay as stay
import pandas as pd

def digest(value):
    if isinstance(value, pd.DataFrame):
        return value.to_json(double_precision=15, orient="split")
    if isinstance(value, np.ndarray):
        return stay.digest(value)
    if isinstance(value, dict):
        return {str(key): digest(entry) for key, entry in value.items()}
    if isinstance(value, scfm.CellBatch):
        return [stay.digest(value.gene_ids_T.numpy()), stay.digest(value.cu_seqlens.numpy())]
    return value.id if isinstance(value, scfm.Model) else type(value).__name__

models, parts = stay.make_models(), {}
for name, (call, _) in stay.CALLS.items():
    adata = stay.make_data()
    parts[name] = [digest(call(adata, models[name])), repr(stay.parts_of(adata))]
Path(folder / "result.json").write_text(json.dumps(parts), encoding="utf-8")
"""


def run(kind, folder, env, job):
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", START + job, kind, str(folder), ",".join(THIRD_PARTY), str(Path(__file__).parent)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("job", [JOB, EVERY_CALL], ids=["the whole job", "every function"])
def test_the_same_result_in_a_strict_environment(job, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    caches = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR", "HF_HOME", "TORCH_HOME")
    strict = {"HOME": str(home), "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    strict |= {name: str(home / name) for name in caches}
    plain = run("plain", tmp_path / "plain", {}, job)
    assert run("strict", tmp_path / "strict", strict, job) == plain
    if job is JOB:
        assert "other \u03b3\u03b4" in plain["labels"]
    if os.getuid() != 0:  # root writes everywhere
        assert not any(home.iterdir())
