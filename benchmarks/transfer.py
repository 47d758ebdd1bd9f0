"""What pretraining transfers: few-shot annotation of a study that no pretraining cell comes from.

    SCFM_DATA=FOLDER python benchmarks/transfer.py blood --seeds 1
    python benchmarks/transfer.py simulated --corpus-cells 2000 20000 200000

`blood`: every labeled blood study in turn (and pancreas, the far tissue) is the target; a model is pretrained on all cells of
the other studies. `simulated`: the corpus of corpus.py in three sizes, and its target study with new types.

Half of the target's cells, at most, are test cells. Some labels per class are drawn from the others, and all methods get the same:

| row | what it is |
| --- | --- |
| fine-tuned | `scfm.fit(model=pretrained)`: the transformer and the gene classifier together |
| fine-tuned, transformer alone | the same without the gene classifier |
| linear probe | balanced logistic regression on the embedding of the pretrained model |
| SVD start, linear probe | the same on the embedding of the model as pretraining starts it: loadings of the corpus, no step |
| from scratch | the same architecture from random weights, trained on the labels for as many steps |
| PCA + LR | balanced logistic regression on 50 components of all target cells, labeled or not |
| LR | balanced logistic regression on all genes |

A seed chooses the cells, the split and the labels. Rows that fine-tune a network have their own number of seeds and of labels
(`--finetune-seeds`, `--finetune-labels`), because each takes minutes, and the others seconds. Models and rows are kept in `--out`;
a stopped run resumes. Tables of macro-F1 with 95 % t intervals over seeds are printed last.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import anndata
import corpus
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from intervals import interval
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import scfm
from scfm import baselines

ALL = 10**9  # as a number of labels per class
MIN_CELLS = 12  # of a class: half of them are tested
MAX_CELLS = 800  # of a target; half of them are tested
TARGET_CELLS = 1000  # of the simulated target: twelve types
REPORT_ROWS = {  # name in the report of `scfm.fit`, name here
    "scfm": "fine-tuned",
    "scfm, transformer alone": "fine-tuned, transformer alone",
    "same architecture from scratch": "from scratch",
}
BASELINES = {
    "SVD-50 of all cells + logistic regression (balanced)": "PCA + LR",
    "logistic regression (balanced)": "LR",
}
FIRST = "linear probe"
ORDER = [
    "fine-tuned",
    "fine-tuned, transformer alone",
    FIRST,
    "SVD start, linear probe",
    "from scratch",
    "PCA + LR",
    "LR",
]


@dataclass(frozen=True)
class Target:
    """A labeled study; files of the same experiment or the same donors share `study`."""

    file: str
    labels_key: str
    study: str


TARGETS = {
    "pbmc3k": Target("pbmc3k_raw_counts_labels.h5ad", "cell_type_seurat", "10x 3k"),
    "kang": Target("kang_ifnb_2000.h5ad", "cell_type", "kang"),
    "ifnb": Target("ifnb1k_832.h5ad", "seurat_annotations", "kang"),
    "zheng sorted": Target("corpus/human_pbmc_facs_zheng_3874x16791.h5ad", "cell_type", "zheng"),
    "zheng purified": Target("corpus/human_pbmc_purified_ref_zheng_2007x8863.h5ad", "cell_type", "zheng"),
    "lymphoid": Target("corpus/human_lymphoid_cell2location_ref_330x9936.h5ad", "cell_type", "lymphoid"),
    "pancreas": Target("", "cell_type", "pancreas"),
}
STUDIES = {target.file: target.study for target in TARGETS.values()} | {
    "corpus/human_pbmc_frozen_donorA_zheng_2896x13939.h5ad": "zheng"
}


@dataclass(frozen=True)
class Budget:
    """Sizes of the runs, small enough for two CPU cores."""

    steps: int = 100  # of pretraining
    pretraining_tokens: int = 49_152  # per step, of all genes of a cell: about 120 simulated cells, and 70 of blood
    context_length: int = 256
    encoding: str = "rank"
    objective: str = "profile"
    finetune_steps: int = 40
    finetune_tokens: int = 8192  # per step


def pretraining_files(target: str) -> list[str]:
    """Human blood sets and the other sets of the corpus, without those of the target's study."""
    folder = Path(os.environ["SCFM_DATA"])
    files = [target.file for target in TARGETS.values() if target.file and "/" not in target.file]
    files += [f"corpus/{path.name}" for path in sorted((folder / "corpus").glob("human_*.h5ad"))]
    return [str(folder / file) for file in files if STUDIES.get(file) != TARGETS[target].study]


def read_target(name: str, seed: int) -> anndata.AnnData:
    """Read a study: classes of at least `MIN_CELLS`, at most `MAX_CELLS` cells, genes in at least three; `obs["label"]`."""
    if name == "simulated":
        adata, key = corpus.make_target(TARGET_CELLS, draw=seed), "cell_type"
    elif name == "pancreas":
        adata, key = scfm.datasets.pancreas(), TARGETS[name].labels_key
    else:
        key = TARGETS[name].labels_key
        adata = anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / TARGETS[name].file)
    adata.X = adata.X.astype(np.float32)
    adata.obs = pd.DataFrame({"label": adata.obs[key].astype(object)}, index=adata.obs_names.astype(str))
    counts = adata.obs["label"].value_counts()
    adata = adata[adata.obs["label"].isin(counts.index[counts >= MIN_CELLS]).to_numpy()].copy()
    if adata.n_obs > MAX_CELLS:
        kept, _ = train_test_split(
            np.arange(adata.n_obs), train_size=MAX_CELLS, stratify=adata.obs["label"], random_state=seed
        )
        adata = adata[np.sort(kept)].copy()
    sc.pp.filter_genes(adata, min_cells=3)
    return adata


def hide_labels(adata: anndata.AnnData, n_labels: int, seed: int) -> anndata.AnnData:
    """Keep the labels of half of the cells for tests, and of `n_labels` per class of the others; `obs["known"]`."""
    label_B = adata.obs["label"].to_numpy()
    learn, test = train_test_split(np.arange(len(label_B)), test_size=0.5, stratify=label_B, random_state=seed)
    shuffled = np.random.default_rng(seed).permutation(learn)
    shown = np.concatenate([shuffled[label_B[shuffled] == name][:n_labels] for name in np.unique(label_B)])
    adata = adata.copy()
    adata.obs["is_test"] = np.isin(np.arange(len(label_B)), test)
    adata.obs["known"] = adata.obs["label"].where(np.isin(np.arange(len(label_B)), np.union1d(shown, test)))
    return adata


def pretrain_and_start(files: list[str], folder: Path, budget: Budget) -> None:
    """Pretrain a model, and make one that stops at the start, from the same decomposition."""
    pretrain(files, folder / "pretrained", budget, train=True)
    if not (folder / "start").exists():
        shutil.copytree(folder / "pretrained" / "statistics", folder / "start" / "statistics")
    pretrain(files, folder / "start", budget, train=False)


def pretrain(files: list[str], out: Path, budget: Budget, *, train: bool) -> None:
    """Pretrain on files, or (`train=False`) stop at the start: one step of a rate that moves nothing."""
    if (out / "model").exists():
        return
    fit = scfm.FitConfig(n_steps=budget.steps, tokens_per_step=budget.pretraining_tokens)
    if not train:
        fit = fit.replace(n_steps=1, tokens_per_step=1024, learning_rate=1e-12)
    scfm.pretrain(
        files,
        out,
        init="svd",
        encoding=scfm.EncodingConfig(kind=budget.encoding, context_length=budget.context_length),
        objective=budget.objective,
        config=fit,
        progress=False,
    )


def probe(adata: anndata.AnnData, key: str) -> dict[str, float]:
    """Scores of a balanced logistic regression on a frozen embedding, `obsm[key]`."""
    is_test = adata.obs["is_test"].to_numpy()
    learn = ~is_test & adata.obs["known"].notna().to_numpy()
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000))
    regression.fit(adata.obsm[key][learn], adata.obs["label"][learn].astype(str))
    return baselines.scores(
        adata.obs["label"][is_test].astype(str).tolist(), regression.predict(adata.obsm[key][is_test]).tolist()
    )


def simple_methods(adata: anndata.AnnData, seed: int) -> pd.DataFrame:
    codes = pd.Categorical(adata.obs["label"].astype(str))
    is_test = adata.obs["is_test"].to_numpy()
    learn = np.flatnonzero(~is_test & adata.obs["known"].notna().to_numpy())
    return baselines.score_annotation_baselines(
        baselines.log_normalize(adata.X),
        codes.categories.to_numpy(dtype=str),
        codes.codes.astype(np.int64),
        learn=learn,
        test=np.flatnonzero(is_test),
        seed=seed,
    )


def score_frozen(name: str, folder: Path, n_labels: list[int], seed: int, budget: Budget) -> pd.DataFrame:
    """One row for each method that trains no network, and each number of labels."""
    target = read_target(name, seed)
    for kind in ("pretrained", "start"):
        scfm.tl.embed(target, scfm.load(folder / kind / "model"), key_added=kind)
    tables = []
    for number in n_labels:
        adata = hide_labels(target, number, seed)
        rows = {FIRST: probe(adata, "pretrained"), "SVD start, linear probe": probe(adata, "start")}
        simple = simple_methods(adata, seed)
        rows |= {ours: simple.loc[theirs].to_dict() for theirs, ours in BASELINES.items()}
        tables.append(as_table(rows).assign(labels=number))
    return pd.concat(tables)


def score_finetuned(name: str, folder: Path, n_labels: list[int], seed: int, budget: Budget) -> pd.DataFrame:
    """One row for each method that trains a network, and each number of labels."""
    target, tables = read_target(name, seed), []
    for number in n_labels:
        model = scfm.fit(
            hide_labels(target, number, seed),
            labels_key="known",
            test_key="is_test",
            model=folder / "pretrained" / "model",
            compare_from_scratch=True,
            baselines=False,
            config=scfm.FitConfig(n_steps=budget.finetune_steps, tokens_per_step=budget.finetune_tokens, seed=seed),
            seed=seed,
            progress=False,
        )
        report = model.report()
        rows = {ours: report.loc[theirs].to_dict() for theirs, ours in REPORT_ROWS.items()}
        tables.append(as_table(rows).assign(labels=number))
    return pd.concat(tables)


def as_table(rows: dict[str, dict[str, float]]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index")[["accuracy", "macro_f1"]]
    return table.rename_axis("method").reset_index()


def measure(
    path: Path,
    score: Callable[[str, Path, list[int], int, Budget], pd.DataFrame],
    name: str,
    folder: Path,
    n_labels: list[int],
    seed: int,
    budget: Budget,
) -> None:
    """Write the rows of one target and seed."""
    started = time.perf_counter()
    rows = score(name, folder, n_labels, seed, budget)
    rows = rows.assign(target=name, model=folder.name, seed=seed, seconds=time.perf_counter() - started)
    rows.to_csv(path.with_suffix(".part"), index=False)
    path.with_suffix(".part").rename(path)


def use_one_core() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)
    warnings.filterwarnings("ignore")


def run_all(calls: list[functools.partial], processes: int) -> None:
    """Run calls in processes of one core each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=use_one_core) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                print(f"\r{done} of {len(futures)}", end="", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print()


def models(options: argparse.Namespace) -> list[tuple[Path, str, list[str]]]:
    """Folder of a pretrained model, a target that it serves, and the files that it learns from."""
    if options.part == "blood":
        return [
            (options.out / "blood" / f"without {TARGETS[name].study}", name, pretraining_files(name))
            for name in options.targets
        ]
    found = []
    for n_cells in options.corpus_cells:
        paths = corpus.write_corpus(options.out / "corpus" / str(n_cells), n_cells)
        found.append((options.out / "simulated" / str(n_cells), "simulated", [str(path) for path in paths]))
    return found


def show(rows: pd.DataFrame) -> None:
    """Print macro-F1 by method and number of labels for each model, and what the linear probe gains over each row."""
    rows = rows.assign(labels=rows["labels"].map(lambda number: "all" if number == ALL else str(number)))
    columns = rows["labels"].unique()
    for (model, target), part in rows.groupby(["model", "target"], sort=False):
        wide = part.pivot(index=["labels", "seed"], columns="method", values="macro_f1")
        order = [method for method in ORDER if method in wide]
        cells, gains = {}, {}
        for labels, method in itertools.product(columns, order):
            values = wide.loc[labels][method].dropna()
            cells[method, labels] = interval(values)
            gains[method, labels] = interval((wide.loc[labels][FIRST] - values).dropna(), "{:+.3f}")
        corpus_of = f"on {model} cells" if target == "simulated" else model
        name = f"{target}, pretrained {corpus_of}"
        for title, table in ((f"{name}: macro-F1", cells), (f"{name}: {FIRST} less the row, paired", gains)):
            lines = [[method, *(table[method, labels] for labels in columns)] for method in order]
            head = [["labels per class", *columns], ["---"] * (len(columns) + 1)]
            print(f"\n{title}\n")
            print("\n".join(f"| {' | '.join(line)} |" for line in [*head, *lines]))


def mean_over_targets(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over all targets, a row for each seed, so that intervals are those of the mean."""
    mean = rows.groupby(["method", "labels", "seed"], sort=False)["macro_f1"].mean().reset_index()
    return mean.assign(target=f"mean of {rows['target'].nunique()} targets", model="without its study")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["blood", "simulated"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--corpus-cells", nargs="+", type=int, default=[2_000, 20_000, 200_000])
    parser.add_argument("--labels", nargs="+", type=int, default=[5, 10, 20, 50, ALL], help="per class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--finetune-labels", nargs="+", type=int, default=[10, ALL], help="per class")
    parser.add_argument("--finetune-seeds", type=int, default=3)
    for name, value in vars(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("transfer_out"))
    options = parser.parse_args()
    budget = Budget(**{name: getattr(options, name) for name in vars(Budget())})
    found = models(options)
    files_of = {folder: files for folder, _, files in found}
    run_all(
        [functools.partial(pretrain_and_start, files, folder, budget) for folder, files in files_of.items()],
        options.processes,
    )
    plan = [("frozen", score_frozen, options.labels, seed) for seed in range(options.seeds)]
    plan += [
        (f"finetuned_{number}", score_finetuned, [number], seed)
        for seed in range(options.finetune_seeds)
        for number in options.finetune_labels
    ]
    tasks = [
        (folder / f"{name}_{kind}_{seed}.csv", score, name, folder, n_labels, seed, budget)
        for kind, score, n_labels, seed in plan
        for folder, name, _ in found
    ]
    run_all([functools.partial(measure, *task) for task in tasks if not task[0].exists()], options.processes)
    rows = pd.concat([pd.read_csv(task[0]) for task in tasks], ignore_index=True)
    show(rows if options.part == "simulated" else pd.concat([rows, mean_over_targets(rows)]))
    minutes = rows.groupby("model", sort=False)["seconds"].unique().map(sum).sum() / 60
    print(f"\nminutes of one core for the rows: {minutes:.0f}")


if __name__ == "__main__":
    main()
