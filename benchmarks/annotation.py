"""Annotation beside simple methods: human pancreas, PBMC 3k, Kang; all labels and a tenth of them; over seeds.

    SCFM_DATA=FOLDER python benchmarks/annotation.py --seeds 5 --out benchmarks/annotation.csv

Seeds come outermost, and finished rows are written at once and kept, so a stopped run goes on where it was.
"""

import argparse
import itertools
import os
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import torch

import scfm
from scfm.tl import evaluate_annotation, summarize_scores

LABELS = {"pancreas": "cell_type", "pbmc3k": "cell_type_seurat", "kang": "cell_type"}
FILES = {"pbmc3k": "pbmc3k_raw_counts_labels.h5ad", "kang": "kang_ifnb_2000.h5ad"}
CONTEXT_LENGTH = 256  # annotation gains nothing from longer cells, and attention costs their square


def read(name: str) -> anndata.AnnData:
    """Cells with a label of a class of at least five; genes in at least three cells."""
    adata = (
        scfm.datasets.pancreas()
        if name == "pancreas"
        else anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / FILES[name])
    )
    labels = adata.obs[LABELS[name]]
    counts = labels.value_counts()
    adata = adata[labels.isin(counts.index[counts >= 5]).to_numpy()].copy()
    adata.X = adata.X.astype(np.float32)
    sc.pp.filter_genes(adata, min_cells=3)
    return adata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--steps", type=int, default=40, help="of pretraining, and again of fine-tuning")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("annotation.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    done = (
        pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=["data", "seed", "label_fraction"])
    )
    for seed, name, fraction in itertools.product(range(options.seeds), options.data, options.fractions):
        if ((done["data"] == name) & (done["seed"] == seed) & (done["label_fraction"] == fraction)).any():
            continue
        started = time.perf_counter()
        rows = evaluate_annotation(
            read(name),
            labels_key=LABELS[name],
            seeds=[seed],
            label_fraction=fraction,
            context_length=CONTEXT_LENGTH,
            config=scfm.FitConfig(n_steps=options.steps, seed=seed),
            progress=False,
        ).assign(data=name, seconds=time.perf_counter() - started)
        done = pd.concat([done, rows], ignore_index=True) if len(done) else rows
        done.to_csv(options.out, index=False)
    for (name, fraction), rows in done.groupby(["data", "label_fraction"], sort=False):
        print(f"\n{name}, {fraction:.0%} of the labels, {rows['seconds'].mean():.0f} s a seed")
        print(summarize_scores(rows).round(3).to_string())


if __name__ == "__main__":
    main()
