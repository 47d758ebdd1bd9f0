"""How long a model takes for all cells, measured on a few of them, and how much memory it needs."""

# Axes: B cells, N sampled cells.

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scfm.data.source import CountSource
from scfm.encoding.genes import GeneMap
from scfm.models.config import ModelConfig
from scfm.models.inference import TOKENS_PER_BATCH
from scfm.models.model import Model
from scfm.models.network import Readout
from scfm.pp._encode import BLOCK_CELLS, EncodedBlock

_CELLS = 64  # that are sampled
_SECONDS = 0.25  # a measurement of this length is enough


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimates for all cells: seconds of `scfm.tl.embed` and `annotate` (None without labels), and memory of `embed`.

    The memory is that on the device of the model, without the weights, and on a CPU without the data.
    """

    embed_seconds: float
    annotate_seconds: float | None
    memory_bytes: int


def estimated(
    model: Model, counts: CountSource, genes: GeneMap, *, n_tokens_B: NDArray[np.integer], input_seconds: float
) -> Estimate | None:
    """Run the model on a few cells, for about a second; None if no sampled cell can be encoded.

    Parameters
    ----------
    model, counts, genes
        Model, cells, and the token of each column.
    n_tokens_B
        Number of tokens of many of the cells.
    input_seconds
        Time to read and encode all cells.

    Notes
    -----
    The time of a cell is proportional to its operations: two per weight and token, and four per width and pair of tokens.
    """
    block = _sample(model, counts, genes)
    if block is None:
        return None
    network = model.network

    def annotate(rows_N: NDArray[np.int64]) -> None:
        model.predict_proba(block.cells.select(rows_N), block.expression_BV[rows_N])

    def seconds(readout: Readout, run: Callable[[NDArray[np.int64]], object]) -> float:
        cost_N, cost_B = (_operations(network.config, readout, n) for n in (block.cells.lengths_B.numpy(), n_tokens_B))
        all_cells = {"typical": cost_B.mean(), "total": cost_B.mean() * counts.n_obs, "batches": n_batches}
        return input_seconds + _seconds(run, cost_N, **all_cells)

    n_batches = int(np.ceil(n_tokens_B.mean() * counts.n_obs / TOKENS_PER_BATCH))
    predicts = bool(model.labels) and network.config.classes.kind != "token"
    return Estimate(
        embed_seconds=seconds(network.embedding_readout, lambda rows_N: model.embed(block.cells.select(rows_N))),
        annotate_seconds=seconds(network.class_readout, annotate) if predicts else None,
        memory_bytes=_memory(model, counts.n_obs, n_tokens_B),
    )


def _sample(model: Model, counts: CountSource, genes: GeneMap) -> EncodedBlock | None:
    rows = np.unique(np.linspace(0, counts.n_obs - 1, _CELLS).astype(int))
    (_, block, depth_B), *_ = counts.select(rows).blocks(_CELLS)
    has_genes_N = np.diff(block.indptr) > 0
    sampled = EncodedBlock(model.encoding, genes, 0, block[has_genes_N], depth_B[has_genes_N])
    usable_N = (sampled.cells.lengths_B > model.encoding.config.n_special_tokens).numpy()
    if not usable_N.any():
        return None
    return EncodedBlock(model.encoding, genes, 0, sampled.block[usable_N], sampled.depth_B[usable_N])


def _operations(config: ModelConfig, readout: Readout, n_tokens_B: NDArray[np.integer]) -> NDArray[np.float64]:
    """Operations of the blocks for cells of these lengths, shape (B,)."""
    n, width = n_tokens_B.astype(np.float64), config.n_heads * config.d_head
    weights = 4 * config.d_model * width + 2 * config.d_model * config.d_ff
    keys = config.attention.n_random_features if config.attention.kind == "linear" else n
    return max(readout.n_blocks, 1) * n * (2 * weights + 4 * width * keys) + n * config.d_model


def _seconds(
    run: Callable[[NDArray[np.int64]], object],
    cost_N: NDArray[np.float64],
    *,
    typical: float,
    total: float,
    batches: int,
) -> float:
    """Seconds for cells that cost `total`, from those of one cell and of many, whose cost is the most `typical`.

    One cell takes the time of a call and of its operations. On a machine with other work the first can be the larger one.
    """
    nearest = np.argsort(np.abs(cost_N - typical), kind="stable")

    def measured(n_cells: int) -> float:
        started = time.perf_counter()
        run(nearest[:n_cells])
        return time.perf_counter() - started

    run(nearest[:1])  # includes what happens once, such as reading the weights
    one = many = measured(1)
    n_cells = 1
    while n_cells < len(nearest) and many < max(_SECONDS, 3 * one):
        n_cells = min(4 * n_cells, len(nearest))
        many = measured(n_cells)
    cost_1, cost_n = cost_N[nearest[0]], cost_N[nearest[:n_cells]].sum()
    if n_cells == 1 or many <= one:
        return float(total / cost_n * many)
    rate = (many - one) / (cost_n - cost_1)
    return float(total * rate + batches * max(one - cost_1 * rate, 0.0))


def _memory(model: Model, n_obs: int, n_tokens_B: NDArray[np.integer]) -> int:
    """Bytes of the states of a batch; on a CPU also those of two blocks of cells and of two copies of the embedding."""
    config, size = model.network.config, 4
    n_tokens = min(max(TOKENS_PER_BATCH, int(n_tokens_B.max())), int(n_tokens_B.mean() * n_obs) + 1)
    width = config.n_heads * config.d_head
    attention = 3 * config.d_model + 4 * width  # residual, input, output; queries, keys, values, attended
    feed_forward = 3 * config.d_model + config.d_ff * (1 if config.activation == "relu" else 2)
    # A half more for temporary results and what the allocator does not reuse: measured 1.2 to 2 times on a CPU.
    states = n_tokens * size * max(attention, feed_forward) * 3 // 2
    if model.device.type != "cpu":
        return states
    cell = n_tokens_B.mean() * 4 * size  # counts with columns, tokens with values
    cells = 2 * int(min(n_obs, BLOCK_CELLS) * cell)
    return states + cells + 2 * n_obs * config.d_embedding * size
