"""A pretraining step beside transformers' BertForMaskedLM: same shape, same cells, same masks, same precision.

    python benchmarks/train.py [--precision both|32-true|bf16-mixed] [--clock wall|cpu] [--rounds 4] [--csv FILE]

Peers run in one process, interleaved; ratios of medians are printed. The peer pads to the longest cell of the batch, as
published training code does; it is shown decoding every position, as `BertForMaskedLM` does, and decoding masked positions only. Its
attention dropout is off (scfm has none), its hidden dropout as published. `--clock cpu` counts processor seconds of one
thread, for a machine that is shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from transformers import BertConfig, BertForMaskedLM

from scfm import objectives
from scfm.data import CellBatch
from scfm.models import CellTransformer, ModelConfig
from scfm.nn import EmbeddingConfig
from scfm.objectives import MaskedGenes

N_TOKENS, WIDTH, HEADS, LAYERS, FEED_FORWARD, CONTEXT = 25_426, 256, 4, 6, 512, 2048  # Geneformer V1-10M


def make_cells(n_cells: int, seed: int) -> CellBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(400, CONTEXT + 1, n_cells)
    genes = [rng.choice(np.arange(2, N_TOKENS), length, replace=False) for length in lengths]
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return CellBatch(gene_ids_T=torch.from_numpy(np.concatenate(genes).astype(np.int32)), cu_seqlens=cu_seqlens)


def pad(cells: CellBatch, values_T: torch.Tensor, fill: int) -> torch.Tensor:
    parts = values_T.long().split(cells.lengths_B.tolist())
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)


def scfm_step(batches: list[CellBatch], autocast: Callable) -> Callable[[int], None]:
    config = ModelConfig(
        n_tokens=N_TOKENS, d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, d_ff=FEED_FORWARD, context_length=CONTEXT,
        embedding=EmbeddingConfig(n_token_types=2), dropout=0.02,
    )  # fmt: skip
    network = CellTransformer(config, special_ids=(0, 1)).train()
    objective = MaskedGenes(mask_id=1, is_gene_V=network.is_gene_V)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> None:
        inputs, targets = objective.corrupt(batches[number], torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        with autocast():
            loss = objectives.total(objective.loss(network, inputs, targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def transformers_step(batches: list[CellBatch], autocast: Callable, *, masked_only: bool) -> Callable[[int], None]:
    config = BertConfig(
        vocab_size=N_TOKENS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD, max_position_embeddings=CONTEXT, hidden_act="relu", hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.0, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    network = BertForMaskedLM(config).train()
    is_gene_V = torch.ones(N_TOKENS, dtype=torch.bool)
    is_gene_V[:2] = False
    objective = MaskedGenes(mask_id=1, is_gene_V=is_gene_V)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> None:
        cells = batches[number]
        inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(number))
        labels_T = torch.full((cells.n_tokens,), -100)
        labels_T[targets["token_N"]] = targets["gene_ids_N"]
        ids, labels = pad(cells, inputs.gene_ids_T, 0), pad(cells, labels_T, -100)
        mask = pad(cells, torch.ones(cells.n_tokens), 0)
        optimizer.zero_grad()
        with autocast():
            if masked_only:
                hidden = network.bert(input_ids=ids, attention_mask=mask).last_hidden_state[labels != -100]
                loss = torch.nn.functional.cross_entropy(network.cls(hidden).float(), labels[labels != -100])
            else:
                loss = network(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


GOALS = {"transformers, every position decoded": 5.0, "transformers, masked positions decoded": 2.5}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(precision: str, batches: list[CellBatch], clock: Callable[[], float]) -> pd.DataFrame:
    """Take a step of each peer in turn, batch by batch; the first batch warms up."""

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")

    torch.manual_seed(0)
    peers = {
        "scfm": scfm_step(batches, autocast),
        "transformers, every position decoded": transformers_step(batches, autocast, masked_only=False),
        "transformers, masked positions decoded": transformers_step(batches, autocast, masked_only=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(len(batches)):
        for name, step in peers.items():
            started = clock()
            step(number)
            if number:
                seconds[name].append(clock() - started)
    n_cells, n_tokens = sum(map(len, batches[1:])), sum(batch.n_tokens for batch in batches[1:])
    rows = []
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["scfm"])]
        rows.append({
            "precision": precision, "step": name, "cells/s": n_cells / sum(times), "tokens/s": n_tokens / sum(times),
            "time over scfm's": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
            "goal": GOALS.get(name),
        })  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["both", "32-true", "bf16-mixed"], default="both")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cells", type=int, default=4, help="cells of a batch")
    parser.add_argument("--csv")
    given = parser.parse_args()
    if given.clock == "cpu":
        torch.set_num_threads(1)
    batches = [make_cells(given.cells, seed) for seed in range(given.rounds + 1)]
    precisions = ["32-true", "bf16-mixed"] if given.precision == "both" else [given.precision]
    table = pd.concat([measure(precision, batches, CLOCKS[given.clock]) for precision in precisions])
    table = table.set_index(["precision", "step"])
    print(
        f"{given.clock} clock, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, {given.cells} cells a step"
    )
    print(table.round(2).to_string())
    if given.csv:
        table.to_csv(given.csv)


if __name__ == "__main__":
    main()
