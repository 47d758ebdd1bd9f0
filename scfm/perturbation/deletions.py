"""Embeddings of all single deletions of one cell, with shared parts of the first block computed once."""

# Axes: N tokens of the cell, C deletions of a run, D model width.

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scfm.models.inference import TOKENS_PER_BATCH
from scfm.models.network import CellTransformer, Readout
from scfm.nn.deletions import DeletionBlock
from scfm.perturbation.edits import Editor, TokenCell
from scfm.perturbation.variants import pack

MAX_RUN = 16  # deletions that share a first block; longer runs need more work for the keys of the run than they save
MIN_CELL = 128  # tokens; packing shorter cells with others is faster


def shares_first_block(network: CellTransformer, editor: Editor, readout: Readout | None = None) -> bool:
    """Whether deletions remove tokens, and the first block has softmax attention."""
    removes = editor.kind == "delete" and not editor.keeps_zeros
    return (
        removes and network.config.attention.kind == "softmax" and (readout or network.embedding_readout).n_blocks > 0
    )


@torch.inference_mode()
def embed_deletions(
    network: CellTransformer, cell: TokenCell, editor: Editor, readout: Readout | None = None
) -> Tensor:
    """Return the vector of the cell without each of its genes, in the order of the tokens, shape (genes, D), float32.

    Parameters
    ----------
    network
        A network in evaluation mode, for which `shares_first_block` is True.
    cell
        The cell, with at least two genes.
    editor
        An editor of kind "delete".
    readout
        The vector to compute; None for the embedding.
    """
    block = prepare(network, cell, editor)
    n_tokens = len(cell)
    first, stop = editor.n_front, n_tokens - editor.n_back
    length = max(1, min(MAX_RUN, TOKENS_PER_BATCH // n_tokens, n_tokens // 2))
    runs = [range(start, min(start + length, stop)) for start in range(first, stop, length)]
    return torch.cat([embed_run(network, cell, editor=editor, block=block, run=run, readout=readout) for run in runs])


@torch.inference_mode()
def prepare(network: CellTransformer, cell: TokenCell, editor: Editor) -> DeletionBlock:
    """Compute the parts that all deletions of a cell share."""
    stays_ND = moved_ND = network.input_states(pack([cell]).to(network.is_gene_V.device))
    if network.embedding.rank is not None and editor.positions == "shift":
        higher = replace(cell, position_N=(np.arange(len(cell)) - 1).clip(min=0))
        moved_ND = network.input_states(pack([higher]).to(network.is_gene_V.device))
    return DeletionBlock(network.blocks[0], stays_ND, moved_ND)  # type: ignore[arg-type]


@torch.inference_mode()
def embed_run(
    network: CellTransformer,
    cell: TokenCell,
    *,
    editor: Editor,
    block: DeletionBlock,
    run: range,
    readout: Readout | None = None,
) -> Tensor:
    """Return the vectors for the deletions of consecutive tokens, shape (C, D)."""
    hidden_TD = block.run(run)
    # Pooling may weigh tokens by values or positions, so both stay with them.
    left = pack([editor.keep(cell, np.arange(len(cell)) != index) for index in run])
    readout = readout or network.embedding_readout
    return network.read_out_from(readout, hidden_TD, left.to(hidden_TD.device), n_done=1).float()
