"""Deleting every gene of a cell: our exact way against a batched transformers loop, and `screen` against exact.

python benchmarks/perturbation.py speed            # V1-10M shape, 2,000 genes, random weights
python benchmarks/perturbation.py screen H5AD      # a model trained on the cells of H5AD, by time and by recall
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import anndata
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

import scfm
from scfm import ops
from scfm.models.network import CellTransformer
from scfm.tl._perturb.edits import Editor
from scfm.tl._perturb.shifts import cosine_distance, goal_shift
from scfm.tl._perturb.stream import embed_variants
from scfm.tl._perturb.variants import cell_of, pack
from scfm.tl._screen.calibrate import projections
from scfm.tl._screen.estimate import Estimator, tapped

V1 = {"d_model": 256, "n_heads": 4, "n_layers": 6, "d_ff": 512, "context_length": 2048}
N_GENES = 2000
VARIANTS_PER_BATCH = 4
REPEATS = 3


def timed(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Least seconds of some runs, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def v1_model() -> scfm.Model:
    names = [f"G{gene}" for gene in range(25_424)]
    vocabulary = scfm.Vocabulary.from_genes(names, special=("pad", "mask"))
    encoding = scfm.encoding.make_encoding(
        scfm.EncodingConfig(kind="rank"), vocabulary=vocabulary, medians=np.ones(len(vocabulary))
    )
    torch.manual_seed(0)
    config = scfm.ModelConfig(n_tokens=len(vocabulary), **V1)
    return scfm.Model(CellTransformer.for_vocabulary(config, vocabulary), encoding)


def speed() -> pd.DataFrame:
    """Variants per second, on a sample of the deletions; then the estimators, in seconds a cell."""
    from transformers import BertConfig, BertModel

    model = v1_model()
    rng = np.random.default_rng(0)
    ids = rng.choice(model.encoding.vocabulary.gene_ids, N_GENES, replace=False).astype(np.int32)
    cell = scfm.CellBatch(gene_ids_T=torch.from_numpy(ids), cu_seqlens=torch.tensor([0, N_GENES]))
    editor, tokens = Editor.of(model.encoding, "delete"), cell_of(cell, 0)
    variants = [editor.edit(tokens, [gene]) for gene in ids[:: N_GENES // VARIANTS_PER_BATCH]]
    batch = pack(variants)
    padded = batch.gene_ids_T.long().view(len(variants), -1)
    config = BertConfig(
        vocab_size=model.network.config.n_tokens, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=512, hidden_act="relu", max_position_embeddings=2048,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()

    def loop() -> None:
        with torch.inference_mode():
            bert(input_ids=padded, attention_mask=torch.ones_like(padded)).last_hidden_state.mean(1)

    seconds = {
        "transformers, float32": timed(loop),
        "scfm, float32": timed(lambda: embed_variants(model, batch)),
        "scfm, bfloat16": timed(lambda: embed_variants(model, batch, precision="bfloat16")),
    }
    rates = {name: len(variants) / value for name, value in seconds.items()}
    exact = N_GENES / rates["scfm, float32"]
    directions = torch.linalg.qr(torch.randn(256, 8))[0]
    goal = torch.randn(256)
    to_goal = timed(lambda: Estimator(model, cell).goal_shift(goal))
    undirected = timed(lambda: Estimator(model, cell).shift(directions))
    verify = 75 / rates["scfm, float32"]
    lines = [{"what": name, "variants_per_s": rate, "seconds": N_GENES / rate} for name, rate in rates.items()]
    lines += [
        {"what": "screen toward a goal", "seconds": to_goal, "times_exact": exact / to_goal},
        {"what": "screen, 8 projections", "seconds": undirected, "times_exact": exact / undirected},
        {"what": "screen, 8 projections, 75 verified", "seconds": undirected + verify,
         "times_exact": exact / (undirected + verify)},
    ]  # fmt: skip
    table = pd.DataFrame(lines)
    table["times_transformers"] = table["seconds"].iloc[0] / table["seconds"]
    return table


def screen(path: str, *, n_cells: int, n_steps: int) -> pd.DataFrame:
    """Recall of the exact best 50, cell by cell, of every estimator, on cells that were held out of the training."""
    adata = anndata.read_h5ad(path)
    longest = np.argsort(-np.asarray((adata.X > 0).sum(1)).ravel(), kind="stable")
    held_out = np.sort(longest[: 20 * n_cells : 20])
    train = adata[np.setdiff1d(np.arange(adata.n_obs), held_out)].copy()
    model = scfm.fit(train, config=scfm.FitConfig(n_steps=n_steps), progress=False)
    cells = scfm.pp.encode(adata[held_out], model)
    goal_D = model.embed(cells).mean(0).astype(np.float64)
    lines: list[dict[str, object]] = []
    for positions in ("shift", "held"):
        directions = projections(model, scfm.pp.encode(train[:200], model), positions=positions, n_projections=8)
        for number in range(n_cells):
            lines += one_cell(model, cells.select([number]), positions, directions, goal_D)
    return pd.DataFrame(lines).groupby(["positions", "estimator"], sort=False).mean().reset_index()


def one_cell(
    model: scfm.Model, cell: scfm.CellBatch, positions: str, directions: torch.Tensor, goal_D: np.ndarray
) -> list[dict[str, object]]:
    editor, tokens = Editor.of(model.encoding, "delete", positions=positions), cell_of(cell, 0)
    variants = [editor.edit(tokens, [gene]) for gene in tokens.gene_ids_N]
    start = time.perf_counter()
    parts = [embed_variants(model, pack(variants[at : at + 16])) for at in range(0, len(variants), 16)]
    exact_s, after = time.perf_counter() - start, np.concatenate(parts)
    before = model.embed(cell).repeat(len(after), 0)
    shift, toward = cosine_distance(before, after), goal_shift(before, after, goal_D)
    estimators: dict[str, tuple[Callable[[], np.ndarray], np.ndarray]] = {
        "rank only": (lambda: -np.arange(len(after), dtype=float), shift),
        "attention roll-out": (lambda: roll_out(model, cell), shift),
        "gradient x input": (lambda: gradient_times_input(model, cell), shift),
        "8 projections": (lambda: Estimator(model, cell, positions=positions).shift(directions).numpy(), shift),
        "toward a goal": (
            lambda: Estimator(model, cell, positions=positions).goal_shift(torch.from_numpy(goal_D)).numpy(), toward
        ),
    }  # fmt: skip
    lines: list[dict[str, object]] = []
    for name, (estimate, truth) in estimators.items():
        values, best = estimate(), set(np.argsort(-truth)[:50].tolist())
        order = np.argsort(-values, kind="stable")
        line: dict[str, object] = {"positions": positions, "estimator": name, "n_genes": len(after)}
        line |= {"spearman": spearmanr(values, truth).statistic}
        line |= {f"top50_in_{size}": len(best & set(order[:size].tolist())) / 50 for size in (50, 75, 150)}
        seconds = timed(estimate, 1)
        line |= {"seconds": seconds, "times_exact": exact_s / seconds}
        line |= {"times_exact_75_verified": exact_s / (seconds + exact_s * 75 / len(after))}
        lines.append(line)
    return lines


def roll_out(model: scfm.Model, cell: scfm.CellBatch) -> np.ndarray:
    """Attention roll-out (Abnar and Zuidema 2020) from the mean embedding: half attention, half identity, by layer."""
    config = model.network.config
    with torch.inference_mode(), tapped(model.network) as taps:
        model.network(cell)
        flow = torch.full((cell.n_tokens,), 1 / cell.n_tokens)
        for qkv in reversed(taps.qkv):
            q, k, _ = qkv.view(-1, 3, config.n_heads, config.d_head).unbind(1)
            probs = torch.softmax(torch.einsum("ihk,jhk->hij", q, k) * config.d_head**-0.5, -1).mean(0)
            flow = 0.5 * flow + 0.5 * flow @ probs
    return flow.numpy()


def gradient_times_input(model: scfm.Model, cell: scfm.CellBatch) -> np.ndarray:
    """Squared length of the gradient of every dimension of the embedding times the gene embedding."""
    kept: list[torch.Tensor] = []
    hook = model.network.embedding.gene.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.enable_grad():
        states_TD = model.network(cell)
    hook.remove()
    total_T = torch.zeros(cell.n_tokens)
    for column in range(states_TD.shape[1]):
        cotangent = torch.zeros_like(states_TD)
        cotangent[:, column] = 1 / cell.n_tokens
        (gradient_TD,) = torch.autograd.grad(states_TD, kept[0], cotangent, retain_graph=True)
        total_T += (gradient_TD * kept[0].detach()).sum(1).square()
    return total_T.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "screen"])
    parser.add_argument("h5ad", nargs="?")
    parser.add_argument("--n-cells", type=int, default=4)
    parser.add_argument("--n-steps", type=int, default=150)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ops.extension_info()['isa']}")
    table = (
        speed() if options.what == "speed" else screen(options.h5ad, n_cells=options.n_cells, n_steps=options.n_steps)
    )
    print(table.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
