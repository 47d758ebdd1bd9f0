"""What a user waits for: each call in fresh processes, in CPU seconds of one thread, and the stages of `scfm.fit`.

python benchmarks/waiting.py [--repeats 3] [--without-fit]

Other programs on the machine only ever make a call slower, so the shortest of several runs is shown. Python's bytecode is kept
between runs, as after an installation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

DATA = """
import anndata, numpy, scfm
from scipy import sparse
model = scfm.load('blood')
genes = list(model.encoding.vocabulary.genes); rng = numpy.random.default_rng(0)
columns = rng.integers(0, len(genes), (20_000, 1_000)).ravel(); rows = numpy.repeat(numpy.arange(20_000), 1_000)
counts = sparse.csr_matrix((numpy.ones(20_000_000, numpy.float32), (rows, columns)), (20_000, len(genes)))
adata = anndata.AnnData(counts); adata.var_names = genes
scfm.pp.check(adata[:100].copy(), model)
"""
LOADED = "import scfm; scfm.load('blood'); import anndata"

# Statements that are not counted, and the statement that is.
CASES = {
    "import torch": ("", "import torch"),
    "import torch, pandas": ("", "import torch, pandas"),
    "import scfm": ("", "import scfm"),
    "scfm --help": ("", "from scfm.cli import main; sys.argv = ['scfm', '--help']; main()"),
    'scfm.load("blood"), first call': ("", "import scfm; scfm.load('blood')"),
    'scfm.load("blood"), after torch and pandas': ("import torch, pandas", "import scfm; scfm.load('blood')"),
    'scfm.load("blood"), second call': ("import scfm; scfm.load('blood')", "scfm.load('blood')"),
    "scfm.pp.check, 20,000 cells, without estimates": (DATA, "scfm.pp.check(adata, model, estimate=False)"),
    "scfm.pp.check, 20,000 cells": (DATA, "scfm.pp.check(adata, model)"),
    "scfm.tl.embed, its import": (LOADED, "scfm.tl.embed"),
    "scfm.tl.annotate, its import": (LOADED, "scfm.tl.annotate"),
    "scfm.tl.perturb, its import": (LOADED, "scfm.tl.perturb"),
    "scfm.tl.screen, its import": (LOADED, "scfm.tl.screen"),
    "scfm.tl.fit, its import": (LOADED, "scfm.tl.fit"),
    "the same after import scanpy": (LOADED + "; import scanpy", "scfm.tl.fit"),
    "scfm.datasets.pbmc": (LOADED, "scfm.datasets.pbmc()"),
}

# Functions of a fit with labels whose time is shown, by module and name. Time within another one of them counts there only.
STAGES = {
    "vocabulary, medians, tokens, new network": ("scfm.tl._fit", "new_model"),
    "pretraining": ("scfm.tl._fit", "_pretrain"),
    "fine-tuning": ("scfm.annotation.finetune", "train_classifier"),
    "outputs of the network for all cells": ("scfm.annotation.finetune", "class_outputs"),
    "linear members, calibration, novelty": ("scfm.annotation.finetune", "fit_linear_parts"),
    "scores of the model": ("scfm.tl._fit", "score_model"),
    "baselines": ("scfm.tl._fit", "score_baselines"),
}

FIT = f"""
import importlib, sys, time
import scfm
adata = scfm.datasets.pbmc()
scfm.tl.fit
stages, seconds, running, last = {STAGES!r}, {{}}, ["import of Lightning"], [time.process_time()]

def tick():
    now = time.process_time()
    seconds[running[-1]] = seconds.get(running[-1], 0.0) + now - last[0]
    last[0] = now

def timed(stage, function):
    def call(*given, **options):
        tick()
        running.append(stage)
        try:
            return function(*given, **options)
        finally:
            tick()
            running.pop()
    return call

import scfm.train.loop
tick()
running[-1] = "the rest: start of the head, records"
for stage, (module, name) in stages.items():
    module = importlib.import_module(module)
    setattr(module, name, timed(stage, getattr(module, name)))
last[0] = time.process_time()
scfm.fit(adata, labels_key="bulk_labels", progress=False)
tick()
for stage, taken in seconds.items():
    print(f"| fit, 700 cells: {{stage}} | {{taken:.2f}} |")
print(f"| fit, 700 cells: all | {{sum(seconds.values()):.2f}} |")
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, every run compiles the sources again
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def seconds(before: str, counted: str, repeats: int) -> float:
    """Least CPU seconds of `counted` in fresh processes, after `before` ran in each."""
    program = (
        f"import atexit, sys, time\n{before}\nstart = time.process_time()\n"
        "atexit.register(lambda: print(time.process_time() - start, file=sys.stderr))\n" + counted
    )
    return min(float(run(program).stderr.split()[-1]) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-fit", action="store_true")
    options = parser.parse_args()
    print("| call | CPU s |\n| --- | ---: |")
    for name, (before, counted) in CASES.items():
        print(f"| {name} | {seconds(before, counted, options.repeats):.2f} |", flush=True)
    if not options.without_fit:
        fitted = run(FIT)
        if fitted.returncode:
            raise RuntimeError(fitted.stderr)
        print(fitted.stdout, end="")


if __name__ == "__main__":
    main()
