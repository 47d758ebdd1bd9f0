"""All single deletions of one cell: the first layer, in which variants differ by few keys, is computed once for many.

Deleting gene g leaves the genes before it as they were, and moves those after it up one rank at most. The first layer thus
sees two versions of each token, not N: their embeddings, queries, keys and values are computed once. Its softmax falls
apart by keys: those outside a run of neighbouring deletions are the same for the whole run, and are attended to once.
"""

# Axes: N tokens of the cell, C deletions of a run, Q queries, H heads, K head width, D model width.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm import ops
from scfm.data import CellBatch
from scfm.models.model import TOKENS_PER_BATCH
from scfm.models.network import CellTransformer
from scfm.perturbation.edits import Editor, TokenCell

LONGEST_RUN = 16  # deletions that share their first layer: more cost more in it than they save
SHORTEST_CELL = 128  # cells below are packed with others instead, which fills the cores better


def shares_first_layer(network: CellTransformer, editor: Editor) -> bool:
    """Whether deletions take tokens away from a network whose first layer is a softmax over them."""
    config = network.config
    one_layer = config.embedding_layer % (config.n_layers + 1) > 0
    return editor.kind == "delete" and not editor.keeps_zeros and config.attention == "softmax" and one_layer


@dataclass(frozen=True)
class FirstLayer:
    """First-layer inputs and q, k, v of each token, in its place and moved up by one; (N, D) and (N, 3, H, K)."""

    hidden: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]


@torch.inference_mode()
def embed_deletions(network: CellTransformer, cell: TokenCell, editor: Editor) -> Tensor:
    """Embedding of the cell without each of its genes, in the order of the tokens, shape (genes, D), float32.

    Parameters
    ----------
    network
        In evaluation mode, one that `shares_first_layer` accepts.
    cell
        Its tokens, at least two genes.
    editor
        Of kind "delete".
    """
    versions = first_layer(network, cell, editor)
    n_tokens = len(cell)
    first, stop = editor.n_front, n_tokens - editor.n_back
    length = max(1, min(LONGEST_RUN, TOKENS_PER_BATCH // n_tokens, n_tokens // 2))
    runs = [range(start, min(start + length, stop)) for start in range(first, stop, length)]
    return torch.cat([embed_run(network, cell, versions, run) for run in runs])


def first_layer(network: CellTransformer, cell: TokenCell, editor: Editor) -> FirstLayer:
    """What all deletions of a cell share."""
    block: Any = network.blocks[0]
    ids_N = torch.from_numpy(cell.gene_ids_N).to(network.is_gene_V.device)
    values_N = None if cell.values_N is None else torch.from_numpy(cell.values_N).to(ids_N.device)
    place_N = torch.arange(len(cell), device=ids_N.device)
    moves = network.embedding.rank is not None and editor.positions == "shift"
    places = (place_N, (place_N - 1).clamp(min=0)) if moves else (place_N,)
    hidden = [network.embedding(ids_N, values_N, place).to(block.attention_norm.weight.dtype) for place in places]
    qkv = [
        block.attention.qkv(block.attention_norm(hidden_ND) if block.norm_first else hidden_ND).view(
            len(cell), 3, network.config.n_heads, network.config.d_head
        )
        for hidden_ND in hidden
    ]
    return FirstLayer((hidden[0], hidden[-1]), (qkv[0], qkv[-1]))


def embed_run(network: CellTransformer, cell: TokenCell, versions: FirstLayer, run: range) -> Tensor:
    """Embeddings of the deletions of neighbouring tokens, shape (C, D)."""
    n_left, config, block = len(cell) - 1, network.config, network.blocks[0]
    stays, moved = versions.hidden
    hidden_TD = torch.cat([part for place in run for part in (stays[:place], moved[place + 1 :])])
    hidden_TD = after_attention(block, hidden_TD, _attend(versions.qkv, run))
    layer = config.embedding_layer % (config.n_layers + 1)
    ids_N = torch.from_numpy(cell.gene_ids_N)
    ids_T = torch.cat([part for place in run for part in (ids_N[:place], ids_N[place + 1 :])])
    cells = CellBatch(gene_ids_T=ids_T, cu_seqlens=torch.arange(0, n_left * len(run) + 1, n_left, dtype=torch.int32))
    cells = cells.to(hidden_TD.device)
    plan = network.plan(cells)
    for block in network.blocks[1:layer]:
        hidden_TD = block(hidden_TD, plan)
    if layer == config.n_layers:
        hidden_TD = network.norm(hidden_TD)
    return network.pool(hidden_TD, cells).float()


def _attend(qkv: tuple[Tensor, Tensor], run: range) -> Tensor:
    """First-layer attention of each deletion in turn, shape (C (N - 1), H K)."""
    (q0, k0, v0), (q1, k1, v1) = (part.unbind(1) for part in qkv)
    first, stop, n_tokens, n_run = run.start, run.stop, len(q0), len(run)
    # Tokens before a deleted one stay and those after it move: which version of a query or key outside the run is
    # meant is the same for the whole run.
    q_QHK = torch.cat([q0[:stop], q1[first:]])
    outside_QHK, lse_QH = ops.attention(
        q_QHK,
        torch.cat([k0[:first], k1[stop:]]),
        torch.cat([v0[:first], v1[stop:]]),
        torch.tensor([0, n_tokens + n_run], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, n_tokens - n_run], dtype=torch.int32),
        return_lse=True,
    )
    # The run's own keys, in both versions: few, so written out.
    k_HKJ = torch.cat([k0[first:stop], k1[first:stop]]).permute(1, 2, 0)
    v_HJK = torch.cat([v0[first:stop], v1[first:stop]]).transpose(0, 1)
    scores_HQJ = torch.matmul(q_QHK.transpose(0, 1), k_HKJ).float() * q_QHK.shape[-1] ** -0.5
    scores_HQJ = torch.cat([lse_QH.T[..., None], scores_HQJ], -1)
    values_HQ1K = outside_QHK.transpose(0, 1)
    attended = q_QHK.new_empty(n_run, n_tokens - 1, *q_QHK.shape[1:])
    for number in range(n_run):
        seen_J = torch.zeros(2 * n_run, dtype=torch.bool, device=q_QHK.device)
        seen_J[:number], seen_J[n_run + number + 1 :] = True, True
        for queries, target in (
            (slice(0, first + number), slice(0, first + number)),
            (slice(stop + number + 1, None), slice(first + number, None)),
        ):
            _merge(scores_HQJ[:, queries], values_HQ1K[:, queries], v_HJK, seen_J, attended[number, target])
    return attended.view(n_run * (n_tokens - 1), -1)


def _merge(scores_HQJ: Tensor, outside_HQK: Tensor, v_HJK: Tensor, seen_J: Tensor, into_QHK: Tensor) -> None:
    """Join what lies outside the run, whose log-sum-exp is the first score, with the seen keys of the run."""
    hidden_J = torch.cat([seen_J.new_zeros(1), ~seen_J])
    probs_HQJ = torch.softmax(scores_HQJ.masked_fill(hidden_J, -torch.inf), -1).to(v_HJK.dtype)
    joined_HQK = torch.matmul(probs_HQJ[..., 1:], v_HJK)
    joined_HQK.addcmul_(probs_HQJ[..., :1], outside_HQK)
    into_QHK.copy_(joined_HQK.transpose(0, 1))


def after_attention(block: Any, hidden_TD: Tensor, attended_TD: Tensor) -> Tensor:
    """What `Block.forward` does once its heads have attended."""
    hidden_TD = block.attention.out(attended_TD, residual=hidden_TD)
    if block.norm_first:
        return block.feed_forward(hidden_TD, block.feed_forward_norm(hidden_TD))
    hidden_TD = block.attention_norm(hidden_TD)
    return block.feed_forward_norm(block.feed_forward(hidden_TD, hidden_TD))
