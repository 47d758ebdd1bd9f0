"""Would int8 do for inference? Its accuracy, simulated exactly, and the speed of torch's int8 product on this CPU.

    python benchmarks/int8.py [--cells 150] [--genes 40] [--only accuracy|speed]

Weights are quantized per output channel and inputs per token, both symmetric to -127..127; products of these integers are exact, so the
results are those of an int8 kernel. Attention, norms and embeddings stay in float32. Peers of the speed take turns; medians in CPU
seconds of one thread.
"""

# Axes: N rows, D inputs, E outputs, B cells.

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import anndata
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

import scfm
from scfm import ops
from scfm.models import CellTransformer
from scfm.nn.linear import Linear

EXACT_INPUTS = 1024  # sums of so many products of int8 are below 2^24, so float32 has them exactly
SHAPES = [(4096, 256, 768), (4096, 256, 512), (4096, 512, 256), (1024, 768, 3072)]  # Geneformer V1-10M, V2-104M


def quantized(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Integers as float32, and the scale of each row."""
    scale_N1 = rows_ND.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (rows_ND / scale_N1).round(), scale_N1


def int8_linear(layer: Linear) -> Callable[..., Tensor]:
    weight_ED, scale_E1 = quantized(layer.weight.detach().float())

    def forward(input_ND: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        integer_ND, scale_N1 = quantized(input_ND.float())
        parts = zip(integer_ND.split(EXACT_INPUTS, 1), weight_ED.split(EXACT_INPUTS, 1))
        output_NE = torch.stack([rows @ columns.T for rows, columns in parts]).sum(0) * scale_N1 * scale_E1.T
        output_NE = output_NE if layer.bias is None else output_NE + layer.bias
        output_NE = output_NE.relu() if relu else output_NE
        return (output_NE if residual is None else residual + output_NE).to(input_ND.dtype)

    return forward


@contextmanager
def in_int8(network: CellTransformer) -> Iterator[None]:
    """Within this statement, the linear layers of all blocks compute as an int8 kernel would."""
    layers = [module for module in network.blocks.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = int8_linear(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def add_outliers(network: CellTransformer) -> None:
    """Make six channels twenty times as large before each linear layer, as in large language models (Dettmers et al. 2022)."""
    for block in network.blocks:
        for norm in (block.attention_norm, block.feed_forward_norm):
            norm.weight.data[:6] *= 20


def cosines(one_BD: np.ndarray, other_BD: np.ndarray, *, centered: bool = False) -> np.ndarray:
    """Cosine of each cell. Without the mean of all cells subtracted, even those of different cells are close to 1."""
    if centered:
        one_BD, other_BD = one_BD - one_BD.mean(0), other_BD - one_BD.mean(0)
    norms = np.linalg.norm(one_BD, axis=1) * np.linalg.norm(other_BD, axis=1)
    return (one_BD * other_BD).sum(1) / norms


def perturbations(adata: anndata.AnnData, model: scfm.Model, genes: list[str]) -> pd.Series:
    table = scfm.tl.perturb(adata, model, genes=genes, n_bootstrap=0, progress=False)
    return table.loc[table["n_cells"] >= 3, "shift_mean"]


def accuracy_of(name: str, model: scfm.Model, options: argparse.Namespace) -> dict[str, object]:
    adata = scfm.datasets.pbmc()[: options.cells].copy()
    few = adata[:20].copy()
    genes = few.var_names[np.argsort(-np.asarray((few.X > 0).sum(0)).ravel(), kind="stable")][: options.genes].tolist()
    scfm.tl.embed(adata, model, precision="bf16", key_added="bf16")
    results = {}
    for precision in ("fp32", "int8"):
        with in_int8(model.network) if precision == "int8" else nullcontext():
            scfm.tl.embed(adata, model, key_added=precision)
            scfm.tl.annotate(adata, model)
            results[precision] = adata.obs["scfm_label"].astype(str), perturbations(few, model, genes)
    (labels, effects), (int8_labels, int8_effects) = results.values()
    bf16, int8 = (cosines(adata.obsm["fp32"], adata.obsm[precision]) for precision in ("bf16", "int8"))
    return {
        "model": name, "cosine, int8, lowest": int8.min(), "median": np.median(int8), "cosine, bf16, lowest": bf16.min(),
        "centered, int8, lowest": cosines(adata.obsm["fp32"], adata.obsm["int8"], centered=True).min(),
        "centered, bf16, lowest": cosines(adata.obsm["fp32"], adata.obsm["bf16"], centered=True).min(),
        "labels changed": (labels != int8_labels).mean(),
        "Spearman of perturbations": spearmanr(effects, int8_effects[effects.index])[0], "genes": len(effects),
    }  # fmt: skip


def geneformer_shape(*, outliers: bool) -> dict[str, object]:
    """Embeddings of random cells by random weights of the shape of Geneformer V1-10M."""
    torch.manual_seed(0)
    preset = scfm.families.preset("geneformer-v1-10m")
    network = CellTransformer(preset.model_config(n_tokens=25_426), special_ids=(0, 1)).eval()
    if outliers:
        add_outliers(network)
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 800, 16)
    gene_ids_T = np.concatenate([rng.choice(np.arange(2, 25_426), length, replace=False) for length in lengths])
    cells = scfm.CellBatch(
        gene_ids_T=torch.from_numpy(gene_ids_T.astype(np.int32)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
    )
    with torch.inference_mode():
        exact_BD = network.embed_cells(cells).numpy()
        with in_int8(network):
            whole_BD = network.embed_cells(cells).numpy()
    int8 = cosines(exact_BD, whole_BD)
    name = "Geneformer V1-10M, random weights" + (", outlier channels" if outliers else "")
    centered = cosines(exact_BD, whole_BD, centered=True).min()
    return {
        "model": name,
        "cosine, int8, lowest": int8.min(),
        "median": np.median(int8),
        "centered, int8, lowest": centered,
    }


def accuracy(options: argparse.Namespace) -> pd.DataFrame:
    adata = scfm.datasets.pbmc()
    fitted = scfm.fit(adata, labels_key="bulk_labels", seed=0, progress=False)
    rows = [accuracy_of("blood", scfm.load("blood"), options), accuracy_of("scfm.fit on 700 PBMC", fitted, options)]
    rows += [geneformer_shape(outliers=outliers) for outliers in (False, True)]
    return pd.DataFrame(rows).set_index("model")


def speed(repeats: int = 7) -> pd.DataFrame:
    """Products of torch's int8 kernels (fbgemm; inputs are quantized within), torch's float32 ones, and scfm's."""
    torch.set_num_threads(1)
    rows = []
    for n_rows, n_inputs, n_outputs in SHAPES:
        layer = torch.nn.Linear(n_inputs, n_outputs).requires_grad_(False)
        dynamic = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear})
        input_ND = torch.randn(n_rows, n_inputs)
        calls: dict[str, Callable[[], object]] = {
            "int8, torch": partial(dynamic, input_ND),
            "fp32, torch": partial(layer, input_ND),
            "fp32, scfm": partial(ops.linear, input_ND, layer.weight, layer.bias),
            "bf16, scfm": partial(ops.linear, input_ND.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            for number in range(repeats + 1):
                for name, call in calls.items():
                    started = time.process_time()
                    call()
                    if number:
                        seconds[name].append(time.process_time() - started)
        operations = 2e-9 * n_rows * n_inputs * n_outputs
        row = {name: operations / statistics.median(times) for name, times in seconds.items()}
        best = max(row[name] for name in row if name != "int8, torch")
        rows.append(
            {"shape": f"{n_rows} x {n_inputs} x {n_outputs}", **row, "int8 over the best": row["int8, torch"] / best}
        )
    return pd.DataFrame(rows).set_index("shape")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=150)
    parser.add_argument("--genes", type=int, default=40)
    parser.add_argument("--only", choices=["accuracy", "speed"])
    options = parser.parse_args()
    if options.only != "accuracy":
        print(f"10^9 operations per second, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
        print(speed().round(2).to_string())
    if options.only != "speed":
        print(accuracy(options).T.round(6).to_string())


if __name__ == "__main__":
    main()
