"""Column sums and deletion effects of keys in plain torch, one chunk of queries at a time."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width, Q queries of a chunk, N keys of a cell.

from __future__ import annotations

import math

import torch
from torch import Tensor

from scfm.ops.options import OperatorOptions
from scfm.ops.reference.attention import cells_of, finite_lse, scores


def column_sums(
    q: Tensor,
    k: Tensor,
    options: OperatorOptions,
) -> Tensor:
    """Sum over queries of each key's probability, (Tk, H)."""
    sums_TH = torch.zeros(k.shape[:2], dtype=_result_dtype(q), device=q.device)
    for cell in cells_of(options):
        for chunk in cell.chunks():
            scores_HQN = scores(q, k, chunk, options)
            probs_HQN = torch.exp(scores_HQN - finite_lse(scores_HQN)[..., None])
            sums_TH[chunk.keys] += probs_HQN[..., : chunk.n_keys].sum(1).T
            if chunk.attends_to_itself:
                sums_TH[chunk.queries] = probs_HQN[..., -1].T
    return sums_TH


def deletion_effects(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: OperatorOptions,
    *,
    of_queries_T: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Change of `sum(grad_out * out)` when a key is deleted, exact in the softmax, (Tk, H).

    With `of_queries_T`, truth values (Tq,), the change of their outputs alone. A kernel that is given a rounded output
    is compared with the effects for the same `out`.
    """
    dtype = _result_dtype(q)
    effects_TH = torch.zeros(k.shape[:2], dtype=dtype, device=q.device)
    for cell in cells_of(options):
        for chunk in cell.chunks():
            query_Q = torch.arange(chunk.queries.start, chunk.queries.stop, device=q.device)
            if of_queries_T is not None:
                query_Q = query_Q[of_queries_T[chunk.queries]]
                if not len(query_Q):
                    continue
            scores_HQN = scores(q, k, chunk, options, query_Q)
            grad_HQK = grad_out[query_Q].to(dtype).transpose(0, 1)
            moved_HQN = grad_HQK @ v[chunk.keys].to(dtype).permute(1, 2, 0)
            if chunk.attends_to_itself:
                own_HQ = (grad_HQK * v[query_Q].to(dtype).transpose(0, 1)).sum(-1)
                moved_HQN = torch.cat([moved_HQN, own_HQ[..., None]], -1)
            total_HQ1 = None
            if out is not None:
                total_HQ1 = (grad_HQK * out[query_Q].to(dtype).transpose(0, 1)).sum(-1, keepdim=True)
            effects_HQN = _effects(scores_HQN, moved_HQN, total_HQ1)[..., : chunk.n_keys]
            if options.cu_seqlens_k is None:  # the key's own query is deleted with it
                key_N = torch.arange(chunk.keys.start, chunk.keys.stop, device=q.device)
                effects_HQN = effects_HQN.masked_fill(query_Q[:, None] == key_N, 0.0)
            effects_TH[chunk.keys] += effects_HQN.sum(1).T
    return effects_TH


def _effects(scores_HQN: Tensor, moved_HQN: Tensor, total_HQ1: Tensor | None) -> Tensor:
    """Effect of each key on each query: P / (1 - P) (sum of P G . v, less its own G . v); `moved_HQN` holds G . v.

    `total_HQ1` replaces that sum, and then 1 - P is used throughout, as a kernel does.

    At most one key of a query has more than half of the attention. For the largest 1 - P may cancel, so the mean over the
    other keys is computed from their own softmax: P (mean of G . v over the others, less its own G . v).
    """
    probs_HQN = torch.exp(scores_HQN - finite_lse(scores_HQN)[..., None])
    if total_HQ1 is not None:
        effects_HQN = probs_HQN / (1.0 - probs_HQN) * (total_HQ1 - moved_HQN)
        return torch.where(probs_HQN < 1.0 - 1e-6, effects_HQN, -total_HQ1)
    top_HQ1 = scores_HQN.argmax(-1, keepdim=True)
    others_HQN = scores_HQN.scatter(-1, top_HQ1, -math.inf)
    others_HQN = torch.exp(others_HQN - finite_lse(others_HQN)[..., None])
    mean_HQ1 = (others_HQN * moved_HQN).sum(-1, keepdim=True)
    total_HQ1 = (probs_HQN * moved_HQN).sum(-1, keepdim=True)
    effects_HQN = probs_HQN / (1.0 - probs_HQN) * (total_HQ1 - moved_HQN)
    effect_HQ1 = probs_HQN.gather(-1, top_HQ1) * (mean_HQ1 - moved_HQN.gather(-1, top_HQ1))
    return effects_HQN.scatter(-1, top_HQ1, effect_HQ1)


def _result_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
