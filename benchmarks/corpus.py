"""A simulated corpus of studies, and a new study with new cell types, to measure what pretraining transfers.

    python benchmarks/corpus.py FOLDER --cells 20000

How counts arise, for a cell of type t in study s:

1. Genes have a baseline log-expression, normally distributed, so that few genes hold most counts.
2. A program is a set of genes with positive log-fold loadings, drawn from a gamma distribution. Programs overlap by chance.
3. Types are leaves of a tree. A lineage has two programs; each of its types has these, and further programs out of a pool
   that all lineages share. Siblings so differ in few programs, and every program serves several types.
4. A cell has its type's programs with log-normal activities, and besides them state programs (cycle, stress) that say
   nothing of the type.
5. A study multiplies every gene by a log-normal batch effect, and has its own depth; a cell has a log-normal depth in it.
6. Counts are negative binomial: Poisson with gamma-distributed rates.

The target study has types that occur in no study of the corpus. They combine the same programs anew, in lineages of their own.
What a model can transfer is therefore which genes belong together, not what a type looks like. Everything follows from the seed.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

# Axes: B cells, G genes, P programs, C types.

N_GENES = 1500
N_PROGRAMS = 48  # lineages and types are made of these
N_STATES = 6  # programs that are no part of a type
GENES_PER_PROGRAM = 30
PROGRAMS_PER_LINEAGE = 2
PROGRAMS_PER_TYPE = 3
LINEAGES, TYPES_PER_LINEAGE = 6, 5
TARGET_LINEAGES, TARGET_TYPES_PER_LINEAGE = 3, 4
DEPTH = 1200.0  # median counts of a cell, over studies
DISPERSION = 2.0  # gamma shape: variance = mean + mean^2 / shape
ACTIVITY_SIGMA = 0.5  # of a cell's log-activities
BATCH_SIGMA, TARGET_BATCH_SIGMA = 0.25, 0.4  # of a study's log-effects on genes
CELLS_PER_FILE = 10_000
STUDIES = 8  # at least, so that a small corpus has as many batch effects and types as a large one
CHUNK = 2_000  # cells that are drawn at a time


@dataclass(frozen=True)
class World:
    """What all studies share: baseline log-expression (G,) and log-fold loadings of programs (P, G)."""

    baseline_G: NDArray[np.float64]
    loading_PG: NDArray[np.float64]

    @property
    def genes(self) -> list[str]:
        return [f"GENE{number:04d}" for number in range(len(self.baseline_G))]


def make_world(seed: int = 0) -> World:
    rng = np.random.default_rng([seed, 0])
    loading_PG = np.zeros((N_PROGRAMS + N_STATES, N_GENES))
    for row_G in loading_PG:
        members = rng.choice(N_GENES, GENES_PER_PROGRAM, replace=False)
        row_G[members] = rng.gamma(2.0, 0.5, GENES_PER_PROGRAM)
    return World(rng.normal(0, 1.2, N_GENES), loading_PG)


def make_types(rng: np.random.Generator, n_lineages: int, n_types: int) -> NDArray[np.float64]:
    """Activity of every program in every type, shape (C, P): those of its lineage, and some of its own."""
    activity_CP = np.zeros((n_lineages * n_types, N_PROGRAMS + N_STATES))
    for lineage in range(n_lineages):
        shared = rng.choice(N_PROGRAMS, PROGRAMS_PER_LINEAGE, replace=False)
        others = np.setdiff1d(np.arange(N_PROGRAMS), shared)
        for number in range(n_types):
            row_P = activity_CP[lineage * n_types + number]
            row_P[shared] = 1.0
            row_P[rng.choice(others, PROGRAMS_PER_TYPE, replace=False)] = rng.uniform(0.6, 1.0, PROGRAMS_PER_TYPE)
    return activity_CP


def draw_study(
    world: World, activity_CP: NDArray[np.float64], names: list[str], n_cells: int, *, seed: list[int], batch: float
) -> anndata.AnnData:
    """Cells of one study: types in unequal proportions, a batch effect and a depth of its own."""
    rng = np.random.default_rng(seed)
    proportion_C = rng.dirichlet(np.full(len(names), 3.0))
    type_B = rng.choice(len(names), n_cells, p=proportion_C)
    effect_G = world.baseline_G + rng.normal(0, batch, len(world.baseline_G))
    depth_B = DEPTH * np.exp(rng.normal(0, 0.4)) * np.exp(rng.normal(0, 0.4, n_cells))
    blocks = [
        _draw_counts(world, activity_CP[type_B[start : start + CHUNK]], effect_G, depth_B[start : start + CHUNK], rng)
        for start in range(0, n_cells, CHUNK)
    ]
    obs = pd.DataFrame({"cell_type": pd.Categorical(np.array(names)[type_B])}, index=[f"c{n}" for n in range(n_cells)])
    return anndata.AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=world.genes))


def _draw_counts(
    world: World,
    activity_BP: NDArray[np.float64],
    effect_G: NDArray[np.float64],
    depth_B: NDArray[np.float64],
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    activity_BP = activity_BP * np.exp(rng.normal(0, ACTIVITY_SIGMA, activity_BP.shape))
    activity_BP[:, N_PROGRAMS:] = rng.exponential(0.5, (len(activity_BP), N_STATES))
    rate_BG = np.exp((effect_G + activity_BP @ world.loading_PG).astype(np.float32))
    rate_BG *= (depth_B / rate_BG.sum(1))[:, None].astype(np.float32)
    rate_BG *= rng.standard_gamma(DISPERSION, rate_BG.shape, dtype=np.float32) / DISPERSION
    return sparse.csr_matrix(rng.poisson(rate_BG).astype(np.int32))


def write_corpus(folder: Path, n_cells: int, seed: int = 0) -> list[Path]:
    """Write the studies of a corpus, one file each; files that are there are kept. Returns their paths.

    A smaller corpus has the same studies and types as a larger one of up to `STUDIES * CELLS_PER_FILE` cells, with fewer cells.
    """
    world, rng = make_world(seed), np.random.default_rng([seed, 1])
    activity_CP = make_types(rng, LINEAGES, TYPES_PER_LINEAGE)
    names = [f"corpus {number}" for number in range(len(activity_CP))]
    n_studies = max(STUDIES, -(-n_cells // CELLS_PER_FILE))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"study{number:03d}_of_{n_studies}_{n_cells}.h5ad" for number in range(n_studies)]
    for number, (path, part) in enumerate(zip(paths, np.array_split(np.arange(n_cells), n_studies))):
        if path.exists():
            continue
        study = draw_study(world, activity_CP, names, len(part), seed=[seed, 2, number], batch=BATCH_SIGMA)
        unfinished = path.with_suffix(".part")
        study.write_h5ad(unfinished, compression="lzf")
        unfinished.rename(path)
    return paths


def make_target(n_cells: int, seed: int = 0, draw: int = 0) -> anndata.AnnData:
    """Draw the target study of a corpus: new types, which combine the programs of the corpus anew.

    `draw` chooses the types and the cells; the programs stay those of `seed`.
    """
    rng = np.random.default_rng([seed, 3, draw])
    activity_CP = make_types(rng, TARGET_LINEAGES, TARGET_TYPES_PER_LINEAGE)
    names = [f"target {number}" for number in range(len(activity_CP))]
    seeds = [seed, 4, draw]
    return draw_study(make_world(seed), activity_CP, names, n_cells, seed=seeds, batch=TARGET_BATCH_SIGMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    paths = write_corpus(options.folder, options.cells, options.seed)
    size = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{options.cells:,} cells in {len(paths)} files, {size:.0f} MB, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
