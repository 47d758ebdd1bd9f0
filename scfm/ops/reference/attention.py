"""Ragged attention in plain torch, forward and backward, one cell and one chunk of queries at a time."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width, Q queries of a chunk, N keys of a cell.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scfm.ops.options import OperatorOptions
from scfm.ops.plan import make_plan

# Scores held at once: (heads, 256 queries, keys of a cell). Large enough that the matrix products run at full speed.
QUERIES_PER_CHUNK = 256


@dataclass(frozen=True)
class Chunk:
    """Some queries of one cell, by their position among the packed tokens, and the keys that all of them attend to."""

    queries: slice
    keys: slice
    attends_to_itself: bool  # each query attends to its own key as well

    @property
    def n_keys(self) -> int:
        return self.keys.stop - self.keys.start


@dataclass(frozen=True)
class Cell:
    """One cell's position among the packed tokens."""

    queries: slice
    keys: slice  # that every query of the cell attends to
    n_known: int | None  # queries from here on attend to their own key as well

    def chunks(self) -> Iterator[Chunk]:
        """All queries that attend to a key; no chunk holds both context and target tokens."""
        start, end = self.queries.start, self.queries.stop
        first_target = end if self.n_known is None else start + self.n_known
        last_attending = first_target if self.keys.start < self.keys.stop else start
        for begin, stop, attends_to_itself in ((start, last_attending, False), (first_target, end, True)):
            for first in range(begin, stop, QUERIES_PER_CHUNK):
                yield Chunk(slice(first, min(first + QUERIES_PER_CHUNK, stop)), self.keys, attends_to_itself)


def check_boundaries(q: Tensor, k: Tensor, options: OperatorOptions) -> None:
    """Cheap, and the only check of the values when a compiled graph runs."""
    make_plan(
        options.cu_seqlens,
        cu_seqlens_k=options.cu_seqlens_k,
        n_known=options.n_known,
        n_tokens=q.shape[0],
        n_tokens_k=k.shape[0],
    )


def cells_of(options: OperatorOptions) -> Iterator[Cell]:
    bounds = options.cu_seqlens.tolist()
    bounds_k = bounds if options.cu_seqlens_k is None else options.cu_seqlens_k.tolist()
    known = None if options.n_known is None else options.n_known.tolist()
    for cell in range(len(bounds) - 1):
        limit = None if known is None else known[cell]
        end_k = bounds_k[cell + 1] if limit is None else bounds_k[cell] + limit
        yield Cell(slice(bounds[cell], bounds[cell + 1]), slice(bounds_k[cell], end_k), limit)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: OperatorOptions,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of every query and, with `return_lse`, its log-sum-exp.

    Shapes as in :func:`scfm.ops.attention`; `key_bias` is (Tk, H). Returns `out` (Tq, H, K) in the dtype of `q` and
    `lse` (Tq, H) in float32 (float64 for float64 input), or (0, H) without `return_lse`.
    """
    check_boundaries(q, k, options)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    by_torch = options.n_known is None and options.key_bias is None and not return_lse and is_fused_by_torch(q)
    lse = torch.full((q.shape[0] if return_lse else 0, q.shape[1]), -math.inf, dtype=_compute_dtype(q), device=q.device)
    for cell in cells_of(options):
        if by_torch and cell.keys.start < cell.keys.stop:
            out[cell.queries] = _torch_attention(q, k, v, cell, options.scale)
            continue
        for chunk in cell.chunks():
            scores_HQN = scores(q, k, chunk, options)
            lse_HQ = finite_lse(scores_HQN)
            if return_lse:
                lse[chunk.queries] = torch.where(lse_HQ == math.inf, -math.inf, lse_HQ).T
            probs_HQN = torch.exp(scores_HQN - lse_HQ[..., None])
            out[chunk.queries] = _mix(probs_HQN, v, chunk).to(q.dtype)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: OperatorOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v` and `key_bias` ((Tk, H), or (0, H) without one); scores are computed again in chunks."""
    dtype = _compute_dtype(q)
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(k.shape, dtype=dtype, device=k.device)
    grad_v = torch.zeros(v.shape, dtype=dtype, device=v.device)
    n_biases = 0 if options.key_bias is None else k.shape[0]
    grad_bias = torch.zeros((n_biases, q.shape[1]), dtype=dtype, device=q.device)
    for cell in cells_of(options):
        for chunk in cell.chunks():
            queries, keys = chunk.queries, chunk.keys
            scores_HQN = scores(q, k, chunk, options)
            probs_HQN = torch.exp(scores_HQN - finite_lse(scores_HQN)[..., None])
            grad_HQK = grad_out[queries].to(dtype).transpose(0, 1)
            grad_probs_HQN = grad_HQK @ v[keys].to(dtype).permute(1, 2, 0)
            if chunk.attends_to_itself:
                own_HQ = (grad_HQK * v[queries].to(dtype).transpose(0, 1)).sum(-1)
                grad_probs_HQN = torch.cat([grad_probs_HQN, own_HQ[..., None]], -1)
            delta_HQ1 = (probs_HQN * grad_probs_HQN).sum(-1, keepdim=True)
            if grad_lse is not None:
                delta_HQ1 = delta_HQ1 - grad_lse[queries].to(dtype).T[..., None]
            grad_scores_HQN = probs_HQN * (grad_probs_HQN - delta_HQ1)

            shared = slice(None, chunk.n_keys)
            query_HQK = q[queries].to(dtype).transpose(0, 1)
            grad_query_HQK = grad_scores_HQN[..., shared] @ k[keys].to(dtype).transpose(0, 1)
            grad_k[keys] += (grad_scores_HQN[..., shared].mT @ query_HQK).transpose(0, 1) * options.scale
            grad_v[keys] += (probs_HQN[..., shared].mT @ grad_HQK).transpose(0, 1)
            if options.key_bias is not None:
                grad_bias[keys] += grad_scores_HQN[..., shared].sum(1).T
            if chunk.attends_to_itself:
                own_HQ1 = grad_scores_HQN[..., -1:]
                grad_query_HQK = grad_query_HQK + own_HQ1 * k[queries].to(dtype).transpose(0, 1)
                grad_k[queries] = (own_HQ1 * query_HQK).transpose(0, 1) * options.scale
                grad_v[queries] = (probs_HQN[..., -1:] * grad_HQK).transpose(0, 1)
                if options.key_bias is not None:
                    grad_bias[queries] = own_HQ1[..., 0].T
            grad_q[queries] = (grad_query_HQK * options.scale).transpose(0, 1).to(q.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def is_fused_by_torch(q: Tensor) -> bool:
    """Whether torch's own attention never has the (N, N) scores in memory: on a GPU it needs them for float64 and some widths."""
    return not q.is_cuda or (q.dtype != torch.float64 and q.shape[2] % 8 == 0 and q.shape[2] <= 256)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, cell: Cell, scale: float) -> Tensor:
    query_1HQK, key_1HNK, value_1HNK = (
        tensor[part].transpose(0, 1)[None] for tensor, part in ((q, cell.queries), (k, cell.keys), (v, cell.keys))
    )
    out_1HQK = scaled_dot_product_attention(query_1HQK, key_1HNK, value_1HNK, scale=scale)
    return out_1HQK[0].transpose(0, 1)


def scores(q: Tensor, k: Tensor, chunk: Chunk, options: OperatorOptions, query_Q: Tensor | None = None) -> Tensor:
    """Scaled and biased scores (H, Q, N) of a chunk of queries; a last column holds each query's own key.

    `query_Q` chooses some of the chunk's queries.
    """
    dtype = _compute_dtype(q)
    queries = chunk.queries if query_Q is None else query_Q
    query_HQK = q[queries].to(dtype).transpose(0, 1) * options.scale
    scores_HQN = query_HQK @ k[chunk.keys].to(dtype).permute(1, 2, 0)
    if options.key_bias is not None:
        scores_HQN += options.key_bias[chunk.keys].to(dtype).T[:, None]
    if not chunk.attends_to_itself:
        return scores_HQN
    own_HQ = (query_HQK * k[queries].to(dtype).transpose(0, 1)).sum(-1)
    if options.key_bias is not None:
        own_HQ = own_HQ + options.key_bias[queries].to(dtype).T
    return torch.cat([scores_HQN, own_HQ[..., None]], -1)


def finite_lse(scores_HQN: Tensor) -> Tensor:
    """Log-sum-exp, +inf for a query that attends to no key, so that its probabilities are 0 and not NaN."""
    lse_HQ = torch.logsumexp(scores_HQN, -1)
    return torch.where(lse_HQ == -math.inf, math.inf, lse_HQ)


def _mix(probs_HQN: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
    dtype = probs_HQN.dtype
    mixed_HQK = probs_HQN[..., : chunk.n_keys] @ v[chunk.keys].to(dtype).transpose(0, 1)
    if chunk.attends_to_itself:
        mixed_HQK = mixed_HQK + probs_HQN[..., -1:] * v[chunk.queries].to(dtype).transpose(0, 1)
    return mixed_HQK.transpose(0, 1)
