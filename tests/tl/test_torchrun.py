"""Embedding and perturbation by two processes of torchrun give what one gives, also when they are stopped in between."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import scfm

WORKER = """
import json, os, sys
from pathlib import Path
import scfm
from scfm.tl import _file_pass
from scfm.perturbation import runner as stream

folder, stop_after = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ["RANK"])
_file_pass.BLOCK_CELLS, stream.VARIANTS_PER_BLOCK = 8, 20
model = scfm.load(folder / "model")
embed, blocks = model.embed, []

def counted(cells, **settings):
    if rank == 1 and len(blocks) == stop_after:
        os._exit(9)
    blocks.append(cells.n_cells)
    return embed(cells, **settings)

model.embed = counted
n_cells = scfm.tl.embed_files([folder / "one.h5ad", folder / "two.h5ad"], folder / "out.npy", model, progress=False)
assert (folder / "out.npy").exists() and n_cells == 73
(folder / f"blocks-{rank}.json").write_text(json.dumps(blocks))
model.embed = embed
adata = scfm.datasets.pbmc()[:9].copy()
table = scfm.tl.perturb(adata, model, n_bootstrap=50, checkpoint=folder / "perturb.npz", progress=False)
table.to_pickle(folder / f"table-{rank}.pkl")
genes = table.index[table["n_cells"] > 2][:2].tolist()
by_gene = scfm.tl.perturb(adata, model, genes=genes, effect_on="genes", n_bootstrap=50, progress=False)
by_gene.to_pickle(folder / f"genes-{rank}.pkl")
"""


def torchrun(tmp_path, stop_after):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "worker.py"), str(tmp_path), str(stop_after)]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_two_processes_embed_and_perturb_what_one_does(tmp_path):
    adata = scfm.datasets.pbmc()
    adata[:40].copy().write_h5ad(tmp_path / "one.h5ad")
    adata[40:73].copy().write_h5ad(tmp_path / "two.h5ad")
    model = scfm.fit(adata[:60].copy(), config=scfm.FitConfig(n_steps=1), progress=False)
    model.save(tmp_path / "model")
    expected = scfm.tl.embed(adata[:73].copy(), model, copy=True).obsm["X_scfm"]

    assert torchrun(tmp_path, stop_after=2).returncode != 0
    assert not (tmp_path / "out.npy").exists()
    done = torchrun(tmp_path, stop_after=99)
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    assert sum(pd.read_json(tmp_path / "blocks-1.json")[0]) == 37 - (
        4 + 8
    )  # its share, less two blocks: the end of a file, and one whole
    assert not (tmp_path / "out.npy.part").exists()

    one = scfm.tl.perturb(adata[:9].copy(), model, n_bootstrap=50, progress=False)
    tables = [pd.read_pickle(tmp_path / f"table-{rank}.pkl") for rank in (0, 1)]
    pd.testing.assert_frame_equal(*tables)
    pd.testing.assert_frame_equal(tables[0].loc[one.index], one, rtol=1e-9)
    assert (tables[0]["p_value"].loc[one.index] == one["p_value"]).all()

    genes = [pd.read_pickle(tmp_path / f"genes-{rank}.pkl") for rank in (0, 1)]
    pd.testing.assert_frame_equal(*genes)
    of_one = scfm.tl.perturb(
        adata[:9].copy(),
        model,
        genes=tables[0]
        .index[tables[0]["n_cells"] > 2][:2]
        .tolist(),  # in the order of the processes: it seeds intervals
        effect_on="genes",
        n_bootstrap=50,
        progress=False,
    )
    key = ["gene", "affected"]
    pd.testing.assert_frame_equal(*(frame.set_index(key).sort_index() for frame in (genes[0], of_one)), rtol=1e-9)
