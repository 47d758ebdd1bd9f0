"""Embedding cells beside transformers' BertForMaskedLM with SDPA: Geneformer V1-10M, same weights, same cells.

    python benchmarks/embed.py [--cells 48] [--rounds 3] [--clock wall|cpu] [--csv FILE]
    python benchmarks/embed.py --around PRESET [--cells 48] [--rounds 3] [--clock wall|cpu]

The second form compares `scfm.tl.embed` of an AnnData of 15,000 genes with the network alone, given encoded cells, for the shape of a
published model with random weights. What surrounds the network is also measured by itself, with a network that returns zeros.

Lengths run from 400 to 2,048 tokens. The peer pads each of its batches of 12 cells, sorted by length, as published code does. Peers
run in one process and take turns; the table shows the median of the rounds, and ratios of medians. `--clock cpu` counts the seconds
of one thread's work instead of those on the wall, for machines that others use at the same time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from unittest import mock

import anndata
import numpy as np
import torch
from scipy.sparse import csr_matrix
from transformers import BertConfig, BertModel
from transformers import BertForMaskedLM as Bert

import scfm
from scfm.data import CellBatch
from scfm.encoding import EncodingConfig, make_encoding
from scfm.families import preset
from scfm.models import CellTransformer, Model
from scfm.models.state import Precision

PEER_BATCH = 12
GOALS = {"scfm, fp32": 4.0, "scfm, bf16": 10.0}


def make_models(folder: Path) -> tuple[BertModel, Model]:
    """A Geneformer V1-10M with random weights, written by transformers and read by both."""
    n_tokens = preset("geneformer-v1-10m").n_tokens
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=n_tokens, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=2048, hidden_act="relu", hidden_dropout_prob=0.02, pad_token_id=0,
    )  # fmt: skip
    Bert(config).save_pretrained(folder)
    genes = [f"ENSG{place:011d}" for place in range(n_tokens - 2)]
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<mask>", *genes])}
    model = scfm.load(folder, vocabulary=vocabulary, medians=dict.fromkeys(genes, 1.0))
    return BertModel.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False).eval(), model


def make_cells(n_cells: int, n_tokens: int) -> CellBatch:
    rng = np.random.default_rng(0)
    lengths = rng.integers(400, 2049, n_cells)
    genes = [rng.choice(np.arange(2, n_tokens), length, replace=False) for length in lengths]
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    return CellBatch(gene_ids_T=torch.from_numpy(np.concatenate(genes).astype(np.int32)), cu_seqlens=cu_seqlens)


@torch.inference_mode()
def embed_with_transformers(bert: BertModel, cells: CellBatch) -> np.ndarray:
    """Mean over tokens of the second-to-last hidden state, as Geneformer's code computes it."""
    ids = cells.gene_ids_T.long().split(cells.lengths_B.tolist())
    order = np.argsort([-len(cell) for cell in ids])
    embedding_BD = np.empty((len(ids), bert.config.hidden_size), np.float32)
    for start in range(0, len(order), PEER_BATCH):
        rows = order[start : start + PEER_BATCH]
        padded_BL = torch.nn.utils.rnn.pad_sequence([ids[row] for row in rows], batch_first=True)
        mask_BL = (padded_BL != 0).long()
        output = bert(input_ids=padded_BL, attention_mask=mask_BL, output_hidden_states=True)
        state_BLD = output.hidden_states[-2].float() * mask_BL[..., None]
        embedding_BD[rows] = (state_BLD.sum(1) / mask_BL.sum(1, keepdim=True)).numpy()
    return embedding_BD


def autocast(bert: BertModel, cells: CellBatch) -> np.ndarray:
    with torch.autocast("cpu", torch.bfloat16):
        return embed_with_transformers(bert, cells)


def cosine(a_BD: np.ndarray, b_BD: np.ndarray) -> float:
    norms = np.linalg.norm(a_BD, axis=1) * np.linalg.norm(b_BD, axis=1)
    return float(((a_BD * b_BD).sum(1) / norms).min())


def random_model(name: str) -> Model:
    """A model of the shape of a preset, for its number of tokens, with random weights."""
    shape = preset(name)
    config = EncodingConfig(**shape.encoding)
    special = ["pad", "mask", *(role for role in ("cls", "eos") if getattr(config, f"add_{role}"))]
    genes = [f"ENSG{place:011d}" for place in range((shape.n_tokens or 20_000) - len(special))]
    vocabulary = scfm.Vocabulary.from_genes(genes, special=special)
    encoding = make_encoding(
        config, vocabulary=vocabulary, medians=np.ones(len(vocabulary)) if config.kind == "rank" else None
    )
    torch.manual_seed(0)
    network_config = shape.model_config(n_tokens=len(vocabulary), pad_id=vocabulary.pad_id)
    return Model(CellTransformer.for_vocabulary(network_config, vocabulary), encoding)


def random_counts(model: Model, n_cells: int, n_genes: int = 15_000) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    lengths = rng.integers(400, 2049, n_cells)
    columns = np.concatenate([np.sort(rng.choice(n_genes, length, replace=False)) for length in lengths])
    counts = 1 + rng.poisson(2.0, len(columns)).astype(np.float32)
    adata = anndata.AnnData(
        csr_matrix((counts, columns, np.concatenate([[0], np.cumsum(lengths)])), (n_cells, n_genes))
    )
    adata.var_names = list(model.encoding.vocabulary.genes[:n_genes])
    return adata


def compare_with_network(
    name: str, model: Model, adata: anndata.AnnData, precision: Precision, rounds: int, clock: Callable[[], float]
) -> None:
    """Print seconds of the network alone, of `scfm.tl.embed`, and of everything around the network."""
    network = model.network_in(precision)
    zeros = torch.zeros(adata.n_obs, model.network.config.d_embedding)

    def embed(cells: anndata.AnnData, _: list[CellBatch]) -> None:
        scfm.tl.embed(cells, model, precision=precision, progress=False)

    @torch.no_grad()
    def alone(_: anndata.AnnData, batches: list[CellBatch]) -> None:
        for batch in batches:
            network.embed_cells(batch)

    def around(cells: anndata.AnnData, batches: list[CellBatch]) -> None:
        with mock.patch.object(CellTransformer, "embed_cells", lambda self, batch, **_: zeros[: len(batch)]):
            embed(cells, batches)

    seconds: dict[Callable[[anndata.AnnData, list[CellBatch]], None], list[float]] = {alone: [], embed: [], around: []}
    for turn in range(rounds + 1):
        cells = adata if turn else adata[:2].copy()  # the first turn warms up
        batches = list(model.batches(scfm.pp.encode(cells, model)))
        for method, taken in seconds.items():
            start = clock()
            method(cells, batches)
            if turn:
                taken.append(clock() - start)
    network_s, embed_s, around_s = (statistics.median(taken) for taken in seconds.values())
    print(
        f"| {name} | {precision} | {adata.n_obs} | {network_s:.2f} | {embed_s:.2f} | {embed_s / network_s:.3f} "
        f"| {1000 * around_s:.0f} | {around_s / network_s:.2%} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--around", metavar="PRESET")
    options = parser.parse_args()
    clock = time.perf_counter
    if options.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    if options.around:
        model = random_model(options.around)
        adata = random_counts(model, options.cells)
        print("| shape | precision | cells | network, s | tl.embed, s | ratio | around it, ms | of the network |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for precision in get_args(Precision):
            compare_with_network(options.around, model, adata, precision, options.rounds, clock)
        return
    with tempfile.TemporaryDirectory() as folder:
        bert, model = make_models(Path(folder))
    cells = make_cells(options.cells, len(model.encoding.vocabulary))
    methods: dict[str, Callable[[], np.ndarray]] = {
        "transformers SDPA, fp32": lambda: embed_with_transformers(bert, cells),
        "transformers SDPA, bf16 autocast": lambda: autocast(bert, cells),
        "scfm, fp32": lambda: model.embed(cells),
        "scfm, bf16": lambda: model.embed(cells, precision="bf16"),
    }
    results = {name: method() for name, method in methods.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, method in methods.items():
            start = clock()
            method()
            seconds[name].append(clock() - start)
    rates = {name: options.cells / statistics.median(times) for name, times in seconds.items()}
    reference = next(iter(methods))
    header = ["method", "cells/s", "times transformers fp32", "lowest cosine", "largest difference", "goal"]
    rows = [
        [
            name,
            f"{rates[name]:.3g}",
            f"{rates[name] / rates[reference]:.2f}",
            f"{cosine(results[name], results[reference]):.6f}",
            f"{np.abs(results[name] - results[reference]).max():.1g}",
            str(GOALS.get(name, "")),
        ]
        for name in methods
    ]
    print(f"{options.cells} cells, {cells.n_tokens:,} tokens, {torch.get_num_threads()} threads, {options.clock} clock")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
