"""What a user waits for: each call in a fresh process, in CPU seconds of one thread, beside the import of torch.

python benchmarks/waiting.py
"""

from __future__ import annotations

import os
import subprocess
import sys

# Statements that are not counted, and the statement that is.
CASES = {
    "import torch": ("", "import torch"),
    "import scfm": ("", "import scfm"),
    "scfm --help": ("", "from scfm.cli import main; sys.argv = ['scfm', '--help']; main()"),
    'scfm.load("blood"), first call': ("", "import scfm; scfm.load('blood')"),
    'scfm.load("blood"), second call': ("import scfm; scfm.load('blood')", "scfm.load('blood')"),
    "scfm.pp.check, 20,000 cells": (
        "import anndata, numpy, scfm; from scipy import sparse; model = scfm.load('blood')\n"
        "genes = list(model.encoding.vocabulary.genes); rng = numpy.random.default_rng(0)\n"
        "columns = rng.integers(0, len(genes), (20_000, 1_000)).ravel(); rows = numpy.repeat(numpy.arange(20_000), 1_000)\n"
        "counts = sparse.csr_matrix((numpy.ones(20_000_000, numpy.float32), (rows, columns)), (20_000, len(genes)))\n"
        "adata = anndata.AnnData(counts); adata.var_names = genes; scfm.pp.check(adata[:10].copy(), model)",
        "scfm.pp.check(adata, model)",
    ),
    "scfm.tl, first use": ("import scfm; scfm.load('blood'); import anndata", "scfm.tl.embed"),
    "scfm.fit, 700 cells with labels, first call": (
        "import scfm; adata = scfm.datasets.pbmc(); scfm.tl.embed",
        "scfm.fit(adata, labels_key='bulk_labels', progress=False)",
    ),
}


def seconds(before: str, counted: str) -> float:
    """CPU seconds of `counted`, after `before` ran, in a fresh process."""
    program = (
        f"import atexit, sys, time\n{before}\nstart = time.process_time()\n"
        "atexit.register(lambda: print(time.process_time() - start, file=sys.stderr))\n" + counted
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    return float(done.stderr.split()[-1])


def main() -> None:
    print("| call | CPU s |\n| --- | ---: |")
    for name, (before, counted) in CASES.items():
        print(f"| {name} | {min(seconds(before, counted) for _ in range(1)):.2f} |", flush=True)


if __name__ == "__main__":
    main()
