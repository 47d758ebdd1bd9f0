"""Column sums and deletion effects of keys in plain torch, one chunk of queries at a time."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width, Q queries of a chunk, N keys of a cell.

from __future__ import annotations

import torch
from torch import Tensor

from scfm.ops.options import OperatorOptions
from scfm.ops.reference.attention import cells_of, finite_lse, scores

# Above this a probability is all of its query's attention: float32 cannot resolve what the other keys would get.
ALL_ATTENTION = 1.0 - 1e-6


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
    out: Tensor,
    options: OperatorOptions,
) -> Tensor:
    """First-order change of `sum(grad_out * out)` when a key is deleted, exact in the softmax, (Tk, H)."""
    dtype = _result_dtype(q)
    effects_TH = torch.zeros(k.shape[:2], dtype=dtype, device=q.device)
    for cell in cells_of(options):
        for chunk in cell.chunks():
            queries, keys = chunk.queries, chunk.keys
            scores_HQN = scores(q, k, chunk, options)
            probs_HQN = torch.exp(scores_HQN - finite_lse(scores_HQN)[..., None])[..., : chunk.n_keys]
            grad_HQK = grad_out[queries].to(dtype).transpose(0, 1)
            delta_HQ1 = (grad_HQK * out[queries].to(dtype).transpose(0, 1)).sum(-1, keepdim=True)
            moved_HQN = delta_HQ1 - grad_HQK @ v[keys].to(dtype).permute(1, 2, 0)
            effects_HQN = torch.where(probs_HQN < ALL_ATTENTION, probs_HQN / (1.0 - probs_HQN) * moved_HQN, -delta_HQ1)
            if options.cu_seqlens_k is None:  # the key's own query is deleted with it
                first = queries.start - cell.queries.start
                effects_HQN.diagonal(first, 1, 2).zero_()
            effects_TH[keys] += effects_HQN.sum(1).T
    return effects_TH


def _result_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
