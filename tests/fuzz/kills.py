"""Kill programs at random moments, and see that what they write is what was there, or complete, and that work resumes.

`python tests/fuzz/kills.py --n 20 --seed 0` kills each of save, fit, embed and pretrain so often; exit status 1 if
anything is lost. A fork stands for each program, so that the moments fall into its work and not into its imports.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import anndata
import numpy as np
import torch
from cases import clean_data

import scfm

CONFIG = scfm.FitConfig(n_steps=2)
PRETRAINING = scfm.FitConfig(n_steps=8, checkpoint_every=2, tokens_per_step=256)


@dataclass
class Program:
    """What is killed, and what must hold afterwards: `check` gives what is wrong, or None."""

    run: Callable[[], None]
    prepare: Callable[[], None]
    check: Callable[[], str | None]


def fit(seed: int) -> scfm.Model:
    settings = {"config": CONFIG, "pretrain_config": CONFIG, "progress": False, "baselines": False}
    return scfm.fit(clean_data(seed), labels_key="type", seed=seed, **settings)


def leftovers(folder: Path, *expected: str) -> str | None:
    names = sorted(path.name for path in folder.iterdir())
    return None if names == sorted(expected) else f"left over: {names}"


def saving(folder: Path, make: Callable[[], scfm.Model], old: scfm.Model, new: scfm.Model) -> Program:
    """A model is made and saved over another one."""
    path = folder / "model"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        old.save(path)

    def check() -> str | None:
        if scfm.load(path).id not in (old.id, new.id):
            return "the model is neither the old nor the new one"
        new.save(path)
        return leftovers(folder, "model") or (None if scfm.load(path).id == new.id else "saving again failed")

    return Program(lambda: make().save(path), prepare, check)


def embedding(folder: Path, old: scfm.Model, new: scfm.Model) -> Program:
    """Cells are embedded over an older embedding."""
    out, files = folder / "out" / "cells.npy", [folder / f"{index}.h5ad" for index in range(8)]
    found = {}
    folder.mkdir(parents=True)
    for index, path in enumerate(files):
        anndata.concat([clean_data(index)] * 20, index_unique="-").write_h5ad(path)
    for name, model in (("old", old), ("new", new)):
        out.parent.mkdir(exist_ok=True)
        scfm.tl.embed_files(files, out, model, progress=False)
        found[name] = np.load(out)

    def prepare() -> None:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        np.save(out, found["old"])

    def check() -> str | None:
        if not any(np.array_equal(np.load(out), embedding) for embedding in found.values()):
            return "the embedding is neither the old nor the new one"
        scfm.tl.embed_files(files, out, new, progress=False)
        if not np.array_equal(np.load(out), found["new"]):
            return "the resumed embedding is another one"
        return leftovers(out.parent, "cells.npy")

    return Program(lambda: scfm.tl.embed_files(files, out, new, progress=False) and None, prepare, check)


def pretraining(folder: Path) -> Program:
    """A run is killed, and must resume to the weights of one that was not."""
    folder.mkdir(parents=True)
    cells = folder / "cells.h5ad"
    anndata.concat([clean_data(seed) for seed in range(4)], index_unique="-").write_h5ad(cells)

    def run(out: Path) -> scfm.Model:
        return scfm.pretrain([cells], out, config=PRETRAINING, progress=False)

    whole = run(folder / "whole")
    out = folder / "run"

    def check() -> str | None:
        resumed = run(out)
        same = all(
            torch.equal(tensor, resumed.network.state_dict()[name])
            for name, tensor in whole.network.state_dict().items()
        )
        return None if same else "the resumed run has other weights"

    return Program(lambda: run(out) and None, lambda: shutil.rmtree(out, ignore_errors=True), check)


def programs(folder: Path) -> dict[str, Program]:
    old, new = fit(0), fit(1)
    return {
        "save": saving(folder / "save", lambda: new, old, new),
        "fit": saving(folder / "fit", lambda: fit(1), old, new),
        "embed": embedding(folder / "embed", old, new),
        "pretrain": pretraining(folder / "pretrain"),
    }


def run_in_fork(program: Program, seconds: float | None) -> float:
    """Run a program in a fork and kill it after so many seconds; how long it ran."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            program.run()
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - started


def kill_often(program: Program, n: int, seed: int) -> list[str]:
    """Kill a program `n` times, at moments spread over how long it takes; what was wrong afterwards."""
    rng = np.random.default_rng(seed)
    program.prepare()
    duration = run_in_fork(program, None)
    wrong = []
    for index in range(n):
        program.prepare()
        run_in_fork(program, float(rng.uniform(0, duration)))
        try:
            complaint = program.check()
        except Exception as error:
            complaint = f"{type(error).__name__}: {error}"
        if complaint is not None:
            wrong.append(f"kill {index}: {complaint}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, program in programs(Path(folder)).items():
            wrong = kill_often(program, options.n, options.seed)
            lost += len(wrong)
            print(f"{name}: {options.n} kills, {len(wrong)} lost", *wrong, sep="\n  ", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
