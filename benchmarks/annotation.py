"""Annotation beside simple methods: human pancreas, PBMC 3k, Kang; all labels and a tenth of them; over seeds.

    SCFM_DATA=FOLDER python benchmarks/annotation.py

Each core takes a seed, data set and share of labels at a time, seeds outermost, and writes its rows at once to a file in
`--rows`, so a stopped run goes on where it was. A summary is written (`annotation.csv` beside this script), and printed last.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from threadpoolctl import threadpool_limits

import scfm
from scfm import baselines
from scfm.data import columns
from scfm.tl import evaluate_annotation, summarize_scores
from scfm.tl._evaluate import hide_labels
from scfm.tl._fit_start import CONTEXT_LENGTH_TO_ANNOTATE

LABELS = {"pancreas": "cell_type", "pbmc3k": "cell_type_seurat", "kang": "cell_type"}
FILES = {"pbmc3k": "pbmc3k_raw_counts_labels.h5ad", "kang": "kang_ifnb_2000.h5ad"}
TEST_FRACTION = 0.3
SUMMARY = Path(__file__).with_suffix(".csv")
# The two that the goals name.
RIVALS = ("logistic regression (balanced)", "SVD-50 of all cells + logistic regression (balanced)")


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


def score_seed(
    adata: anndata.AnnData, key: str, fraction: float, seed: int, *, variants: bool, n_dispersed: int | None
) -> pd.DataFrame:
    """One row per method, with the default settings of `scfm.fit`, or with a limited number of genes and no simple methods."""
    encoding = scfm.EncodingConfig(
        kind="rank", n_dispersed_genes=n_dispersed, context_length=CONTEXT_LENGTH_TO_ANNOTATE
    )
    limited = {"baselines": False, "encoding": encoding}
    rows = evaluate_annotation(
        adata,
        **({} if n_dispersed is None else limited),
        labels_key=key,
        seeds=[seed],
        label_fraction=fraction,
        test_fraction=TEST_FRACTION,
        variants=variants,
        progress=False,
    )
    if find_spec("celltypist") is None or n_dispersed is not None:
        return rows
    peer = score_celltypist(
        hide_labels(
            adata,
            columns.labels(adata.obs, key),
            labels_key=key,
            label_fraction=fraction,
            test_fraction=TEST_FRACTION,
            seed=seed,
        ),
        key,
    )
    return pd.concat([rows, pd.DataFrame([{**rows.iloc[0], "method": "CellTypist", **peer}])], ignore_index=True)


def score_celltypist(adata: anndata.AnnData, key: str) -> dict[str, Any]:
    """CellTypist's logistic regression by stochastic gradient descent.

    Genes are scaled but not centered (its `with_mean=False`), which keeps the matrix sparse; other settings as they come.
    """
    import celltypist

    logging.getLogger("celltypist").setLevel(logging.ERROR)
    celltypist.logger.logger.setLevel(logging.ERROR)
    normalized = anndata.AnnData(baselines.log_normalize(adata.X), obs=adata.obs, var=adata.var)
    is_test = adata.obs["is_test"].to_numpy()
    learn = normalized[~is_test & adata.obs[key].notna().to_numpy()].copy()
    model = celltypist.train(learn, labels=key, use_SGD=True, with_mean=False, n_jobs=1, random_state=0)
    query = normalized[is_test].copy()
    query.X = query.X.toarray()  # it assigns to the scaled matrix, which a sparse one does not allow
    proba = celltypist.annotate(query, model=model).probability_matrix
    names = proba.columns.to_numpy()
    truth = pd.Categorical(adata.obs[key][is_test], categories=names).codes
    return {"setting": "inductive", **baselines.score_proba(proba.to_numpy(), names, truth)}


def use_one_core() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)
    warnings.filterwarnings("ignore")


def measure(path: Path, name: str, fraction: float, seed: int, variants: bool, n_dispersed: int | None) -> None:
    """Write the rows of one seed, data set and share of labels, with what they took."""
    started, cpu = time.perf_counter(), time.process_time()
    rows = score_seed(read(name), LABELS[name], fraction, seed, variants=variants, n_dispersed=n_dispersed)
    rows = rows.assign(data=name, seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu)
    rows.to_csv(path.with_suffix(".part"), index=False)
    path.with_suffix(".part").rename(path)


def measure_all(tasks: list[tuple[str, float, int]], processes: int, folder: Path, *options: Any) -> pd.DataFrame:
    """Rows of all tasks, of which those in `folder` are not measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{fraction}_{seed}.csv" for name, fraction, seed in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=use_one_core) as pool:
        missing = [pool.submit(measure, path, *task, *options) for path, task in zip(paths, tasks) if not path.exists()]
        try:
            for future in as_completed(missing):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval over seeds, a row a data set, share of labels, method and setting."""
    parts = []
    for name, fraction in itertools.product(LABELS, sorted(rows["label_fraction"].unique(), reverse=True)):
        part = rows[(rows["data"] == name) & (rows["label_fraction"] == fraction)]
        if len(part):
            table = summarize_scores(part).reset_index()
            parts.append(table.assign(data=name, label_fraction=fraction, cpu_seconds=part["cpu_seconds"].mean()))
    return pd.concat(parts, ignore_index=True)


def as_markdown(summary: pd.DataFrame, score: str) -> str:
    """One score as a table for README.md: a row a method, a column a data set and share of labels."""
    table = summary.assign(
        column=summary["data"] + " " + summary["label_fraction"].map("{:.0%}".format),
        cell=summary[score].map("{:.3f}".format) + " ± " + summary[f"{score}_interval"].map("{:.3f}".format),
    )
    wide = table.pivot(index=["method", "setting"], columns="column", values="cell")
    wide = wide.loc[table.set_index(["method", "setting"]).index.unique(), table["column"].unique()].reset_index()
    lines = [wide.columns, ["---"] * wide.shape[1], *wide.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def compare(summary: pd.DataFrame) -> pd.DataFrame:
    """Our macro-F1 and accuracy less the better of the two rivals', by data and share of labels."""
    lines = []
    for (fraction, name), part in summary.groupby(["label_fraction", "data"], sort=False):
        rival = part[part["method"].isin(RIVALS)]
        ours = part[part["method"] == "scfm"].set_index("setting")
        for setting, row in ours.iterrows():
            lines.append(
                {
                    "labels": f"{fraction:.0%}",
                    "data": name,
                    "setting": setting,
                    "macro-F1": row["macro_f1"],
                    "better rival": rival["macro_f1"].max(),
                    "difference": row["macro_f1"] - rival["macro_f1"].max(),
                    "accuracy less the best of all": row["accuracy"]
                    - part.loc[part["method"] != "scfm", "accuracy"].max(),
                }
            )
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=Path, default=Path("annotation_rows"))
    parser.add_argument(
        "--variants", action="store_true", help="also without pretraining, and with the test cells among the unlabeled"
    )
    parser.add_argument(
        "--dispersed-genes", type=int, help="offer the transformer only this number of genes; no simple methods"
    )
    options = parser.parse_args()
    tasks = itertools.product(range(options.seeds), options.data, options.fractions)
    tasks = [(name, share, seed) for seed, name, share in tasks]
    rows = measure_all(tasks, options.processes, options.rows, options.variants, options.dispersed_genes)
    summary = summarize(rows)
    if options.dispersed_genes is None:
        summary.round(4).to_csv(SUMMARY, index=False)
    for score in ("macro_f1", "accuracy", "ece"):
        print(
            f"\n{score}: mean and 95 % interval over {summary['n_seeds'].max()} seeds\n\n{as_markdown(summary, score)}"
        )
    print("\n" + compare(summary).round(3).to_string(index=False))
    minutes = rows.drop_duplicates(["data", "label_fraction", "seed"]).groupby("data")["cpu_seconds"].sum() / 60
    print("\nCPU minutes: " + ", ".join(f"{name} {value:.1f}" for name, value in minutes.items()))


if __name__ == "__main__":
    main()
