"""Annotation of cells of another study, condition or donor, and of a type that training left out.

    SCFM_DATA=FOLDER python benchmarks/shift.py shift
    SCFM_DATA=FOLDER python benchmarks/shift.py unseen
    SCFM_DATA=FOLDER python benchmarks/shift.py unseen-elsewhere

`shift`: PBMC 3k, Kang (control, stimulated) and ifnb. Each study is left out in turn (Kang's two conditions are one study),
each condition of Kang and ifnb is predicted from the other, and each donor of Kang from the other donors. Labels are mapped
to types that the studies share. `unseen`: one cell type is left out of training; its cells should get a higher novelty than
the held-out cells of the other types. `unseen-elsewhere`: the same for the conditions and studies of `shift`. Rows are
written at once to `--rows`, so a stopped run resumes.
"""

import argparse
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from annotation import score_celltypist
from intervals import interval
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import scfm
from scfm import baselines
from scfm.annotation.adapt import MIN_CELLS

FILES = {"pbmc3k": "pbmc3k_raw_counts_labels.h5ad", "kang": "kang_ifnb_2000.h5ad", "ifnb": "ifnb1k_832.h5ad"}
LABELS = {"pbmc3k": "cell_type_seurat", "kang": "cell_type", "ifnb": "seurat_annotations"}
CONDITIONS = {"kang": "condition", "ifnb": "stim"}
SHARED_TYPES = {
    "CD4 T": ("CD4 T cells", "Naive CD4 T", "Memory CD4 T", "CD4 Naive T", "CD4 Memory T"),
    "CD8 T": ("CD8 T", "CD8 T cells"),
    "CD14 monocyte": ("CD14+ Monocytes", "CD14 Mono", "CD14+ Mono"),
    "CD16 monocyte": ("FCGR3A+ Monocytes", "FCGR3A+ Mono", "CD16 Mono"),
    "B": ("B", "B cells"),
    "NK": ("NK", "NK cells"),
    "dendritic": ("DC", "Dendritic cells"),
    "megakaryocyte": ("Platelet", "Megakaryocytes"),
}
TYPE_OF = {name: shared for shared, names in SHARED_TYPES.items() for name in names}
UNSEEN = {
    "pbmc3k": ("NK", "CD8 T", "B"),
    "kang": ("NK cells", "CD14+ Monocytes", "B cells"),
    "pancreas": ("beta", "ductal"),
}
UNSEEN_ELSEWHERE = ("NK", "B", "CD14 monocyte")  # of SHARED_TYPES
MIN_LABELS = 3


def read(name: str) -> anndata.AnnData:
    """Labeled cells with at least 100 genes; genes in at least three cells; labels in `obs["label"]`."""
    if name == "pancreas":
        adata, key = scfm.datasets.pancreas(), "cell_type"
    else:
        adata, key = anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / FILES[name]), LABELS[name]
    adata = adata[adata.obs[key].notna().to_numpy()].copy()
    adata.X = adata.X.astype(np.float32)
    adata.obs["label"] = adata.obs[key].astype(str)
    sc.pp.filter_cells(adata, min_genes=100)
    sc.pp.filter_genes(adata, min_cells=3)
    return adata


def shifts() -> Iterator[tuple[str, anndata.AnnData, NDArray[np.bool_]]]:
    """Name of each task, its cells, and which of them are test cells."""
    cells = {name: read(name) for name in FILES}
    for name, key in CONDITIONS.items():
        condition = cells[name].obs[key].astype(str).str.lower().to_numpy()
        for held_out in ("stim", "ctrl"):
            yield f"{name} {held_out} from the other condition", cells[name], condition == held_out
    shared = {name: adata[:, ~adata.var_names.duplicated()].copy() for name, adata in cells.items()}
    for adata in shared.values():
        adata.obs["label"] = adata.obs["label"].map(TYPE_OF)
    joined = anndata.concat(shared, label="study", join="inner", index_unique="-")
    for name in FILES:
        yield f"{name} from other studies", joined, (joined.obs["study"] == name).to_numpy()
    donors = cells["kang"].obs["donor"].astype(str).to_numpy()
    for donor in np.unique(donors):
        yield f"kang donor {donor} from other donors", cells["kang"], donors == donor


def learnable(adata: anndata.AnnData, is_test: NDArray[np.bool_]) -> anndata.AnnData:
    """Cells of types with at least three training cells, with `obs["is_test"]`."""
    counts = adata.obs["label"][~is_test].value_counts()
    keep = adata.obs["label"].isin(counts.index[counts >= MIN_LABELS]).to_numpy()
    chosen = adata[keep].copy()
    chosen.obs["is_test"] = is_test[keep]
    chosen.obs["label"] = pd.Categorical(chosen.obs["label"].astype(str))
    return chosen


def score_shift(adata: anndata.AnnData, seed: int) -> pd.DataFrame:
    """One row per method: the report of `scfm.fit`, `map_reference`, and what else needs the query: Harmony and CellTypist."""
    model = scfm.fit(adata, labels_key="label", test_key="is_test", seed=seed, progress=False)
    rows = model.report().reset_index().drop(columns="above_scfm")
    is_test = adata.obs["is_test"].to_numpy()
    reference, query = adata[~is_test].copy(), adata[is_test].copy()
    scfm.tl.map_reference(query, reference, model, labels_key="label", baselines=False)
    adapt = query.n_obs >= MIN_CELLS  # fewer: as predicted
    settings = {"labels_key": "label", "baselines": False, "key_added": "scfm_mapped_adapted"}
    scfm.tl.map_reference(query, reference, model, adapt=adapt, **settings)
    scfm.tl.annotate(query, model, adapt=adapt, key_added="scfm_adapted")
    more = [
        {"method": method, "setting": setting, **score_labels(query, key)}
        for method, setting, key in (
            ("scfm.tl.map_reference", "inductive", "scfm_mapped"),
            ("scfm, annotate(adapt=True)", "transductive", "scfm_adapted"),
            ("scfm.tl.map_reference(adapt=True)", "transductive", "scfm_mapped_adapted"),
        )
    ]
    if find_spec("harmonypy"):
        more.append(
            {"method": "Harmony + 15 nearest neighbors", "setting": "transductive", **score_harmony(adata, is_test)}
        )
    if find_spec("celltypist"):
        more.append({"method": "CellTypist", **score_celltypist(adata, "label")})
    return pd.concat([rows, pd.DataFrame(more)], ignore_index=True)


def score_harmony(adata: anndata.AnnData, is_test: NDArray[np.bool_]) -> dict[str, float]:
    """15 nearest neighbors on 50 components of reference and query, corrected for the difference between the two."""
    import harmonypy

    component_BR = TruncatedSVD(50, random_state=0).fit_transform(baselines.log_normalize(adata.X))
    part = pd.DataFrame({"part": np.where(is_test, "query", "reference")})
    corrected = np.asarray(harmonypy.run_harmony(component_BR, part, ["part"], verbose=False, random_state=0).Z_corr)
    corrected = corrected if len(corrected) == adata.n_obs else corrected.T
    truth = adata.obs["label"].astype(str).to_numpy()
    neighbors = KNeighborsClassifier(15).fit(corrected[~is_test], truth[~is_test])
    names, proba = neighbors.classes_, neighbors.predict_proba(corrected[is_test])
    return baselines.score_proba(proba, names, pd.Categorical(truth[is_test], categories=names).codes)


def score_labels(query: anndata.AnnData, key: str) -> dict[str, float]:
    """Score `obs["KEY_label"]` and `obs["KEY_confidence"]`."""
    truth, predicted = (query.obs[column].astype(str).to_numpy() for column in ("label", f"{key}_label"))
    ece = baselines.expected_calibration_error(query.obs[f"{key}_confidence"].to_numpy(), predicted == truth)
    return {**baselines.scores(list(truth), list(predicted)), "ece": ece}


def score_unseen(name: str, unseen: str, seed: int) -> pd.DataFrame:
    """How well novelty and confidence separate a type that training left out from held-out cells of the other types."""
    adata = read(name)
    is_unseen = (adata.obs["label"] == unseen).to_numpy()
    held_out = np.random.default_rng(seed).random(adata.n_obs) < 0.3
    known = learnable(adata[~is_unseen], held_out[~is_unseen])
    model = scfm.fit(known, labels_key="label", test_key="is_test", baselines=False, seed=seed, progress=False)
    test = anndata.concat([known[known.obs["is_test"].to_numpy()], adata[is_unseen]])
    return score_novelty(model, test, test.obs["label"].astype(str).to_numpy() == unseen)


def score_unseen_elsewhere(adata: anndata.AnnData, is_test: NDArray[np.bool_], unseen: str, seed: int) -> pd.DataFrame:
    """The same for cells of another study or condition: the known cells are novel too, in part."""
    is_unseen = (adata.obs["label"] == unseen).to_numpy()
    known = learnable(adata[~(is_unseen & ~is_test)], is_test[~(is_unseen & ~is_test)])
    model = scfm.fit(known, labels_key="label", test_key="is_test", baselines=False, seed=seed, progress=False)
    test = anndata.concat([known[known.obs["is_test"].to_numpy()], adata[is_unseen & is_test]])
    return score_novelty(model, test, test.obs["label"].astype(str).to_numpy() == unseen)


def score_novelty(model: scfm.Model, test: anndata.AnnData, is_unseen: NDArray[np.bool_]) -> pd.DataFrame:
    """Novelty of single cells and of groups (`adapt=True`), and confidence, of cells of an unseen type and of known types."""
    assert model.calibration is not None
    of_cells, of_groups = model.calibration.novelty_threshold, model.calibration.group_novelty_threshold
    # With too few calibration cells, `adapt` keeps the novelty of single cells.
    limits = {"novelty": of_cells, "group novelty": of_cells if of_groups is None else of_groups}
    row = {}
    for name, threshold in limits.items():
        scfm.tl.annotate(test, model, adapt=name == "group novelty", progress=False)
        novelty = test.obs["scfm_novelty"].to_numpy()
        row[f"AUROC of {name}"] = roc_auc_score(is_unseen, novelty)
        row[f"unseen rejected by {name}"] = float((novelty[is_unseen] > threshold).mean())
        row[f"known kept by {name}"] = float((novelty[~is_unseen] <= threshold).mean())
        if name == "novelty":
            row["AUROC of confidence"] = roc_auc_score(is_unseen, -test.obs["scfm_confidence"].to_numpy())
    return pd.DataFrame([row])


def tasks(what: str) -> list[tuple[str, Callable[[int], pd.DataFrame]]]:
    """Name of each task, and what measures it with a seed."""
    if what == "shift":
        return [(name, partial(score_shift, learnable(adata, is_test))) for name, adata, is_test in shifts()]
    if what == "unseen":
        pairs = [(name, unseen) for name, types in UNSEEN.items() for unseen in types]
        return [(f"{name} without {unseen}", partial(score_unseen, name, unseen)) for name, unseen in pairs]
    found = []
    for name, adata, is_test in shifts():
        label = adata.obs["label"].astype(str)
        for unseen in UNSEEN_ELSEWHERE:
            names = [
                own for own in label.unique() if TYPE_OF.get(own, own) == unseen and (label[is_test] == own).sum() >= 20
            ]
            if names and not name.endswith("donors"):
                measure = partial(score_unseen_elsewhere, adata, is_test, names[0])
                found.append((f"{name}, without {unseen}", measure))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("shift", "unseen", "unseen-elsewhere"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=Path("shift_rows"))
    options = parser.parse_args()
    options.rows.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tables = []
    for seed, (name, measure) in itertools.product(range(options.seeds), tasks(options.what)):
        path = options.rows / f"{options.what} {name} {seed}.csv"
        if not path.exists():
            measure(seed).assign(task=name, seed=seed).to_csv(path, index=False)
        tables.append(pd.read_csv(path))
    table = pd.concat(tables, ignore_index=True)
    print(summarize_shift(table) if options.what == "shift" else summarize_unseen(table))


def summarize_shift(table: pd.DataFrame) -> str:
    """Scores of each method by kind of task: means over the tasks of a kind, with intervals over seeds."""
    table["kind"] = table["task"].str.replace(r".*(studies|condition|donors)$", r"\1", regex=True)
    scores = ["accuracy", "macro_f1", "ece"]
    index = ["method", "setting", "kind"]
    of_seeds = table.groupby([*index, "seed"], sort=False)[scores].mean()
    return str(of_seeds.groupby(index, sort=False).agg(interval).unstack().to_markdown())


def summarize_unseen(table: pd.DataFrame) -> str:
    """Scores for each type that was left out, and their means over types, with intervals over seeds."""
    scores = [name for name in table if name not in ("task", "seed")]
    means = table.groupby("seed", as_index=False)[scores].mean().assign(task="mean")
    return str(pd.concat([table, means]).groupby("task", sort=False)[scores].agg(interval).to_markdown())


if __name__ == "__main__":
    main()
