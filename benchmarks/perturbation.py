"""Deleting every gene of a cell: our exact way beside a batched transformers loop, and `screen` beside exact; Perturb-seq; markers.

    python benchmarks/perturbation.py exact [--clock cpu]     # V1-10M shape, 2,000 genes, random weights
    python benchmarks/perturbation.py screen [--clock cpu]    # a model trained on pancreas cells, by time and by recall
    python benchmarks/perturbation.py predict                 # knock-outs left out in turn (SCFM_DATA names the folder)
    python benchmarks/perturbation.py markers                 # genes that hold cells in their type, beside their markers

Each but the last ends within five minutes on two cores. `--clock cpu` counts the seconds of one thread's work instead of those on the wall, for
machines that others use at the same time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from intervals import interval
from scipy.stats import spearmanr
from sklearn.model_selection import train_test_split

import scfm
from scfm import baselines, ops
from scfm.models.network import CellTransformer
from scfm.perturbation.deletions import embed_deletions, embed_run, prepare
from scfm.perturbation.edits import Editor
from scfm.perturbation.screening.directions import projections
from scfm.perturbation.screening.estimate import Estimator
from scfm.perturbation.shifts import cosine_distance, goal_shift
from scfm.perturbation.variants import cell_of, pack

# Geneformer V1-10M; its embedding is the mean of the second-to-last hidden state.
V1 = {"d_model": 256, "n_heads": 4, "n_layers": 6, "d_ff": 512, "context_length": 2048, "pooling": {"hidden_layer": -2}}
N_GENES = 2000
N_VARIANTS = 8  # of the 2,000; a batch of ours, and of the peer
N_TOP = 50
MARKER_DATA = ("pbmc3k", "pancreas")
MIN_CELLS_TO_LEARN, MIN_CELLS_OF_TYPE, MAX_CELLS_OF_TYPE = 10, 5, 20
GOAL = "beta"  # the commonest type
TRAINING = {"n_steps": 150, "tokens_per_step": 4096}
TRAINING_CELLS = 600  # of the 1,937: more than the steps read
N_CELLS = {"shift": 2, "held": 1}  # that exact deletion is run on
PATHWAY = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]  # of interferon gamma, which the cells were given

clock = time.perf_counter


def seconds_of(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def v1_model() -> scfm.Model:
    names = [f"G{gene}" for gene in range(25_424)]
    vocabulary = scfm.Vocabulary.from_genes(names, special=("pad", "mask"))
    encoding = scfm.encoding.make_encoding(
        scfm.EncodingConfig(kind="rank"), vocabulary=vocabulary, medians=np.ones(len(vocabulary))
    )
    torch.manual_seed(0)
    config = scfm.ModelConfig.from_dict({"n_tokens": len(vocabulary), **V1})
    return scfm.Model(CellTransformer.for_vocabulary(config, vocabulary), encoding)


def exact(rounds: int = 4) -> pd.DataFrame:
    """Variants per second on a sample of the deletions, taking turns; the median of the rounds."""
    from transformers import BertConfig, BertModel

    model = v1_model()
    rng = np.random.default_rng(0)
    ids = rng.choice(model.encoding.vocabulary.gene_ids, N_GENES, replace=False).astype(np.int32)
    cell = cell_of(scfm.CellBatch(gene_ids_T=torch.from_numpy(ids), cu_seqlens=torch.tensor([0, N_GENES])), 0)
    editor = Editor.of(model.encoding, "delete")
    run = range(N_GENES // 2, N_GENES // 2 + N_VARIANTS)
    batch = pack([editor.edit(cell, [ids[place]]) for place in run])
    padded = batch.gene_ids_T.long().view(N_VARIANTS, -1)
    config = BertConfig(
        vocab_size=model.network.config.n_tokens, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=512, hidden_act="relu", max_position_embeddings=2048, attn_implementation="sdpa",
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()

    def loop() -> object:
        output = bert(input_ids=padded, attention_mask=torch.ones_like(padded), output_hidden_states=True)
        return output.hidden_states[-2].mean(1)

    networks = {"fp32": model.network, "bf16": model.network_in("bf16")}
    methods: dict[str, Callable[[], object]] = {"transformers SDPA, fp32": loop}
    with torch.inference_mode():
        for name, network in networks.items():
            methods[f"scfm, every variant by itself, {name}"] = lambda net=network: net.embed_cells(batch)
            block = prepare(network, cell, editor)
            methods[f"scfm.tl.perturb, {name}"] = lambda net=network, block=block: embed_run(
                net, cell, editor=editor, block=block, run=run
            )
        taken: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(1 + rounds):
            for name, method in methods.items():
                taken[name].append(seconds_of(method))
    table = pd.DataFrame(
        {"seconds a variant": {name: np.median(all_[1:]) / N_VARIANTS for name, all_ in taken.items()}}
    )
    table["variants/s"] = 1 / table["seconds a variant"]
    table["times transformers"] = table["variants/s"] / table["variants/s"].iloc[0]
    return table.drop(columns="seconds a variant").rename_axis("method").reset_index()


def screen() -> pd.DataFrame:
    """Recall of the exact best 50, cell by cell, of every estimator, on cells that were held out of the training."""
    adata = scfm.datasets.pancreas()
    n_genes = np.asarray((adata.X > 0).sum(1)).ravel()
    long = np.flatnonzero((n_genes >= 1700) & (n_genes <= 2000) & (adata.obs["cell_type"] != GOAL).to_numpy())
    rng = np.random.default_rng(0)
    held_out = rng.choice(long, N_CELLS["shift"], replace=False)
    others = np.setdiff1d(np.arange(adata.n_obs), held_out)
    train = adata[np.sort(rng.choice(others, TRAINING_CELLS, replace=False))].copy()
    config = scfm.FitConfig(**TRAINING)
    started = clock()
    model = scfm.fit(train, context_length=2048, config=config, progress=False)
    print(f"{TRAINING['n_steps']} steps of {TRAINING['tokens_per_step']} tokens: {clock() - started:.0f} s", flush=True)
    networks = {precision: model.network_in(precision) for precision in ("fp32", "bf16")}
    cells = scfm.pp.encode(adata[held_out], model)
    goal_D = model.embed(scfm.pp.encode(train[train.obs["cell_type"] == GOAL][:50], model)).mean(0).astype(np.float64)
    lines: list[dict[str, object]] = []
    for positions, n_cells in N_CELLS.items():
        started = clock()
        directions = projections(model, scfm.pp.encode(train[:100], model), positions=positions, n_projections=8)
        print(f"calibration, {positions}: {clock() - started:.0f} s for each call", flush=True)
        for number in range(n_cells):
            lines += one_cell(model, networks, cells.select([number]), positions, directions, goal_D)
            print(f"{positions}, cell {number + 1} of {n_cells}: {lines[-1]['genes']} genes", flush=True)
    return pd.DataFrame(lines).groupby(["positions", "estimator"], sort=False).mean().reset_index()


def one_cell(
    model: scfm.Model,
    networks: dict[str, CellTransformer],
    cell: scfm.CellBatch,
    positions: str,
    directions_DR: torch.Tensor,
    goal_D: np.ndarray,
) -> Iterator[dict[str, object]]:
    editor, tokens = Editor.of(model.encoding, "delete", positions=positions), cell_of(cell, 0)
    started = clock()
    after = embed_deletions(model.network, tokens, editor).numpy()
    exact_s = clock() - started
    before = model.embed(cell).repeat(len(after), 0)
    truths = {"toward a goal": goal_shift(before, after, goal_D), "undirected": cosine_distance(before, after)}
    for aim, truth_N in truths.items():
        for name, estimate in estimators(model, networks, cell, positions, aim, directions_DR, goal_D).items():
            taken = [seconds_of(estimate) for _ in range(2)]
            estimate_N, best = estimate(), set(np.argsort(-truth_N)[:N_TOP].tolist())
            order = np.argsort(-estimate_N, kind="stable")
            line: dict[str, object] = {"positions": positions, "estimator": f"{aim}, {name}", "genes": len(after)}
            line["spearman"] = spearmanr(estimate_N, truth_N).statistic
            line |= {f"in {size}": len(best & set(order[:size].tolist())) / N_TOP for size in (50, 75, 150)}
            line["times exact"] = np.nan if name == "rank" else exact_s / min(taken)
            line["with 75 verified"] = exact_s / (min(taken) + exact_s * 75 / len(after))
            yield line


def estimators(
    model: scfm.Model,
    networks: dict[str, CellTransformer],
    cell: scfm.CellBatch,
    positions: str,
    aim: str,
    directions_DR: torch.Tensor,
    goal_D: np.ndarray,
) -> dict[str, Callable[[], np.ndarray]]:
    """Ours in each precision, and what they stand beside."""
    goal = torch.from_numpy(goal_D)

    def ours(network: CellTransformer) -> np.ndarray:
        estimator = Estimator(network, cell, positions=positions)
        return (estimator.goal_shift(goal) if aim == "toward a goal" else estimator.shift(directions_DR)).numpy()

    return {
        **{f"screen {precision}": partial(ours, network) for precision, network in networks.items()},
        "rank": lambda: -np.arange(cell.n_tokens, dtype=float),
        "attention roll-out": lambda: roll_out(model, cell),
        "gradient x input": lambda: gradient_times_input(model, cell, goal_D if aim == "toward a goal" else None),
    }


def roll_out(model: scfm.Model, cell: scfm.CellBatch) -> np.ndarray:
    """Attention roll-out (Abnar and Zuidema 2020) from the mean embedding: half attention, half identity, by layer."""
    with torch.inference_mode(), model.network.record() as recording:
        model.network(cell)
        flow = torch.full((cell.n_tokens,), 1 / cell.n_tokens)
        for q, k, *_ in reversed(recording.attention):
            probs = torch.softmax(torch.einsum("ihk,jhk->hij", q, k) * q.shape[-1] ** -0.5, -1).mean(0)
            flow = 0.5 * flow + 0.5 * flow @ probs
    return flow.numpy()


def gradient_times_input(model: scfm.Model, cell: scfm.CellBatch, goal_D: np.ndarray | None = None) -> np.ndarray:
    """Gradient times the gene embedding: of the cosine with a goal, or its squared length over 16 random directions."""
    kept: list[torch.Tensor] = []
    hook = model.network.embedding.gene.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.enable_grad():
        mean_D = model.network(cell).mean(0)
        if goal_D is not None:
            wanted = [torch.nn.functional.cosine_similarity(mean_D, torch.from_numpy(goal_D).float(), dim=0)]
        else:
            wanted = list(torch.randn(16, len(mean_D), generator=torch.Generator().manual_seed(0)) @ mean_D)
    hook.remove()
    products = []
    for value in wanted:
        (gradient_TD,) = torch.autograd.grad(value, kept[0], retain_graph=True)
        products.append((gradient_TD * kept[0].detach()).sum(1))
    # Without the gene, its contribution goes.
    return (-products[0] if goal_D is not None else torch.stack(products).square().sum(0)).numpy()


def predict() -> pd.DataFrame:
    """Papalexi 2021, 25 targets in THP-1 cells: each left out in turn; the model has seen control cells only."""
    folder = os.environ.get("SCFM_DATA")
    if folder is None:
        raise SystemExit("Set SCFM_DATA to the folder of papalexi_thp1_20729x299.h5ad.")
    adata = anndata.read_h5ad(Path(folder) / "papalexi_thp1_20729x299.h5ad")
    key, control = "target_argmax", "non-targeting"
    config = scfm.FitConfig(n_steps=60, tokens_per_step=4096)
    model = scfm.fit(adata[adata.obs[key] == control].copy(), config=config, progress=False)
    scores = scfm.tl.score_perturbation_prediction(adata, model, perturbation_key=key, control=control)
    table = scores.groupby("method", sort=False)[["pearson_top", "rmse", "rank"]].mean()
    pathway = scores[scores["perturbation"].isin(PATHWAY)].groupby("method", sort=False)
    for name in ("pearson_top", "rank"):
        table[f"{name}, {len(PATHWAY)} of the pathway"] = pathway[name].mean()
    return table.reset_index()


def markers(n_seeds: int, rows: Path) -> pd.DataFrame:
    """AUC and precision of the top 50 markers of each type, found in training cells, in rankings of genes of held-out cells.

    "scfm" ranks genes by how much their deletion lowers the log-odds of the cell's own type, in a model that was fitted to the
    training cells: by its ensemble, or by its transformer alone. The simple methods read the held-out cells. One row per data set, type, method and seed.
    """
    rows.mkdir(parents=True, exist_ok=True)
    found = []
    for seed, name in itertools.product(range(n_seeds), MARKER_DATA):
        path = rows / f"markers {name} {seed}.csv"
        if not path.exists():
            _score_markers(name, seed).to_csv(path, index=False)
        found.append(pd.read_csv(path))
    table = pd.concat(found, ignore_index=True)
    means = table.groupby(["data", "method", "seed"], sort=False, as_index=False)[["auc", "precision"]].mean()
    table = pd.concat([table, means.assign(type="mean")])
    lines = []
    for (data, state, method), part in table.groupby(["data", "type", "method"], sort=False):
        line = {"data": data, "type": state, "method": method}
        lines.append({**line, "auc": interval(part["auc"]), "precision": interval(part["precision"])})
    return pd.DataFrame(lines)


def _score_markers(name: str, seed: int) -> pd.DataFrame:
    if name == "pancreas":
        adata, key = scfm.datasets.pancreas(), "cell_type"
    else:
        adata = anndata.read_h5ad(Path(os.environ["SCFM_DATA"]) / "pbmc3k_raw_counts_labels.h5ad")
        key = "cell_type_seurat"
    counts = adata.obs[key].value_counts()
    adata = adata[adata.obs[key].isin(counts.index[counts >= MIN_CELLS_TO_LEARN]).to_numpy()].copy()
    adata.obs[key] = adata.obs[key].astype(str)
    learn, held_out = train_test_split(
        np.arange(adata.n_obs), test_size=0.3, stratify=adata.obs[key], random_state=seed
    )
    adata.obs["is_test"] = np.isin(np.arange(adata.n_obs), held_out)
    model = scfm.fit(adata, labels_key=key, test_key="is_test", baselines=False, seed=seed, progress=False)
    alone = copy.deepcopy(model)
    alone.network.gene_classifier = None
    rankings = {"scfm": model, "scfm, transformer alone": alone}
    learned, test = adata[learn].copy(), adata[held_out].copy()
    learned.X = baselines.log_normalize(learned.X)
    sc.tl.rank_genes_groups(learned, key, method="t-test", n_genes=N_TOP)
    lines = []
    for state in sorted(test.obs[key].unique()):
        cells = np.flatnonzero(test.obs[key] == state)
        if len(cells) < MIN_CELLS_OF_TYPE:
            continue
        some = test[cells[:MAX_CELLS_OF_TYPE]].copy()
        best = [str(gene) for gene in learned.uns["rank_genes_groups"]["names"][state]]
        for (who, by), positions in itertools.product(rankings.items(), ("shift", "held")):
            options = {"measure": "label", "groupby": key, "positions": positions, "n_verify": 0, "n_check": 0}
            effects = scfm.tl.screen(some, by, **options, n_bootstrap=0, progress=False)
            scores = scfm.tl.evaluate_perturbation(effects, best, test, groupby=key, group=state, n_permutations=200)
            scores = scores.rename(index={"scfm": f"{who}, positions {positions}"})
            if lines and lines[-1]["type"] == state:  # simple methods once
                scores = scores.iloc[:1]
            lines += [
                {"data": name, "type": state, "method": method, "seed": seed, **row}
                for method, row in scores.iterrows()
            ]
    return pd.DataFrame(lines)


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exact", "screen", "predict", "markers"])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--seeds", type=int, default=5, help="of markers")
    parser.add_argument("--rows", type=Path, default=Path("marker_rows"), help="folder of markers, for what is done")
    options = parser.parse_args()
    if options.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    measures = {"exact": exact, "screen": screen, "predict": predict}
    table = markers(options.seeds, options.rows) if options.what == "markers" else measures[options.what]()
    print(f"{torch.get_num_threads()} threads, {options.clock} clock, {ops.extension_info()['isa']}")
    print(table.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
