"""Damage saved models, load each, and see that it is refused, or is in every output what was saved.

`python tests/fuzz/models.py --n 1000 --seed 0` prints what fails, with the seeds; exit status 1 if anything does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from cases import clean_data, step

import scfm
from scfm.errors import ModelFileError

Damage = Callable[[Path, Path, np.random.Generator], str]
DAMAGES: dict[str, Damage] = {}


def any_file(folder: Path, rng: np.random.Generator) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return files[rng.integers(len(files))]


def damage(name: str) -> Callable[[Damage], Damage]:
    return step(DAMAGES, name)  # type: ignore[arg-type, return-value]


@damage("cut short")
def _(folder: Path, other: Path, rng: np.random.Generator) -> str:
    path = any_file(folder, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])
    return path.name


for _name, _stop in (("bits flipped", None), ("bits of the header flipped", 200)):

    @damage(_name)
    def _(folder: Path, other: Path, rng: np.random.Generator, stop: int | None = _stop) -> str:
        path = any_file(folder, rng)
        content = bytearray(path.read_bytes())
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content[:stop]))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        return path.name


@damage("a block overwritten")
def _(folder: Path, other: Path, rng: np.random.Generator) -> str:
    path = any_file(folder, rng)
    content = bytearray(path.read_bytes())
    start = rng.integers(len(content))
    filler = [b"\0", b"\xff", b"\xff\xff\xff\x7f"][rng.integers(3)] * 128
    content[start : start + len(filler)] = filler[: len(content) - start]
    path.write_bytes(content)
    return path.name


@damage("more at the end")
def _(folder: Path, other: Path, rng: np.random.Generator) -> str:
    path = any_file(folder, rng)
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 100))))
    return path.name


@damage("removed")
def _(folder: Path, other: Path, rng: np.random.Generator) -> str:
    path = any_file(folder, rng)
    path.unlink()
    return path.name


@damage("of another model")
def _(folder: Path, other: Path, rng: np.random.Generator) -> str:
    path = any_file(folder, rng)
    shutil.copy(other / path.name if (other / path.name).exists() else any_file(other, rng), path)
    return path.name


@damage("two files exchanged")
def _(folder: Path, other: Path, rng: np.random.Generator) -> str:
    one, two = any_file(folder, rng), any_file(folder, rng)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"{one.name}, {two.name}"


ODD_VALUES = (None, -1, 0, 2, 10**9, 0.5, 1e308, float("nan"), "", "text", "../x", True, [], {}, [1], {"a": 1})


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = [(value, key) for key, _ in children]
    for _, child in children:
        if isinstance(child, dict | list):
            found += _entries(child)
    return found


@damage("a value of a JSON file")
def _(folder: Path, other: Path, rng: np.random.Generator) -> str:
    files = sorted(folder.glob("*.json"))
    path = files[rng.integers(len(files))]
    content = json.loads(path.read_text())
    entries = _entries(content)
    container, key = entries[rng.integers(len(entries))]
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    path.write_text(json.dumps(content))
    return f"{path.name}, {key}"


def fit_models(folder: Path) -> dict[str, Path]:
    """Two pairs of models of one architecture each, by name."""
    paths = {}
    for name, kind, seed in (("a", "rank", 0), ("b", "rank", 1), ("c", "bin", 0), ("d", "bin", 1)):
        model = scfm.fit(
            clean_data(seed), labels_key="type", encoding=kind, seed=seed, config=scfm.FitConfig(n_steps=1), progress=False,
            baselines=False,
        )  # fmt: skip
        paths[name] = folder / name
        model.save(paths[name])
    return paths


def outputs(model: scfm.Model) -> tuple[Any, ...]:
    adata = clean_data(3)
    scfm.tl.annotate(adata, model)
    scfm.tl.embed(adata, model)
    table = adata.obs.astype(str).to_csv()
    return model.id, model.labels, table, adata.obsm["X_scfm"].tobytes(), adata.obsm["scfm_proba"].tobytes()


def run_case(
    seed: int, paths: dict[str, Path], expected: dict[str, tuple[Any, ...]], folder: Path
) -> tuple[str, str | None]:
    """Damage a copy of a model and load it; what was done, and what is wrong, or None."""
    rng = np.random.default_rng(seed)
    name = list(paths)[rng.integers(len(paths))]
    other = {"a": "b", "b": "a", "c": "d", "d": "c"}[name]
    copy = folder / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(paths[name], copy)
    kind = list(DAMAGES)[rng.integers(len(DAMAGES))]
    what = f"{kind}: {DAMAGES[kind](copy, paths[other], rng)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outputs(scfm.load(copy))
    except ModelFileError:
        return what, None
    except Exception as error:
        return what, f"{type(error).__name__}: {str(error)[:200]}"
    return what, None if found == expected[name] else "loaded, and is another model"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        paths = fit_models(Path(name))
        expected = {model: outputs(scfm.load(path)) for model, path in paths.items()}
        for seed in range(options.seed, options.seed + options.n):
            what, wrong = run_case(seed, paths, expected, Path(name))
            outcomes["wrong" if wrong else "right"] += 1
            if wrong:
                print(f"seed {seed} ({what}): {wrong}", flush=True)
    print(f"{outcomes.total()} damaged models: " + ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    return 1 if outcomes["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
