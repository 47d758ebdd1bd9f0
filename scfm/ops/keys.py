"""Attention scores that are asked for by name, and what deleting a key does: without a matrix of all scores."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width, P pairs.

from __future__ import annotations

import math

import torch
from torch import Tensor

from scfm.ops.attention import (
    Backend,
    attention,
    check_key_bias,
    check_qkv,
    check_scale,
    checked_plan,
    options_of,
    readable,
)
from scfm.ops.backend import choose_backend
from scfm.ops.plan import AttentionPlan
from scfm.ops.reference import keys as reference


@torch.no_grad()
def attention_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    *,
    pairs: Tensor | None = None,
    head_mean: bool = False,
    lse: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    n_known: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention probabilities of chosen pairs, or what each key gets from all queries of its cell.

    Parameters
    ----------
    q, k, cu_seqlens, cu_seqlens_k, n_known, key_bias, scale, plan, backend
        As for :func:`scfm.ops.attention`.
    pairs
        (query, key) token numbers, shape (P, 2), counted from the start of the batch. Without it the result is each
        key's sum over queries.
    head_mean
        Average over heads.
    lse
        Log-sum-exp (Tq, H) of the same attention, where it is at hand; otherwise it is computed.

    Returns
    -------
    Probabilities (P, H), or column sums (Tk, H); without the last axis with `head_mean`. float32. A pair across cells,
    or hidden by the mask, has probability 0. Not differentiable.

    Raises
    ------
    ValueError
        If shapes do not fit or a pair names a token that is not there; and as :func:`scfm.ops.attention`.

    Examples
    --------
    >>> import torch, scfm
    >>> q, k = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    >>> cu_seqlens = torch.tensor([0, 3, 5])
    >>> pairs = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 4]])
    >>> probability_P = scfm.ops.attention_scores(q, k, cu_seqlens, pairs=pairs, head_mean=True)
    >>> round(float(probability_P[:3].sum()), 4), float(probability_P[3])  # token 4 is of another cell
    (1.0, 0.0)
    """
    check_qkv(q, k, k)
    q, k = readable(q), readable(k)
    bias_TH = None if key_bias is None else check_key_bias(key_bias, k)
    plan = checked_plan(plan, cu_seqlens, cu_seqlens_k, n_known, q, k)
    scale = check_scale(scale, q)
    bounds = (plan.cu_seqlens, plan.cu_seqlens_k, plan.n_known, bias_TH, scale)
    options = options_of(plan, bias_TH)
    fused = pairs is None and choose_backend(backend, q, options=options, operator="column_sums") == "fused"
    if lse is None and (pairs is not None or fused):
        lse = attention(
            q, k, k, cu_seqlens, cu_seqlens_k=cu_seqlens_k, n_known=n_known, key_bias=key_bias, scale=scale, plan=plan,
            return_lse=True, backend=backend,
        )[1]  # fmt: skip
    if pairs is not None:
        assert lse is not None
        probs = _pair_scores(q, k, _checked_pairs(pairs, q, k), lse, plan, bias_TH, scale)
    elif fused:
        probs = torch.ops.scfm.attention_column_sums(q, k, lse, *bounds)
    else:
        probs = reference.column_sums(q, k, *bounds)
    return probs.mean(-1) if head_mean else probs


@torch.no_grad()
def deletion_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    grad_out: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    n_known: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """What deleting each key does to a function of the outputs, for every key at about the cost of one backward.

    With a_ig the probability of key g for query i, o_i the output and G_i the function's gradient there:
    `sum over i != g of a_ig / (1 - a_ig) G_i . (o_i - v_g)`, the softmax without key g in closed form.

    Parameters
    ----------
    q, k, v, cu_seqlens, cu_seqlens_k, n_known, key_bias, scale, plan, backend
        As for :func:`scfm.ops.attention`.
    grad_out
        Gradient of the function of interest to the outputs, shape (Tq, H, K), dtype of `q`.
    out, lse
        Output and log-sum-exp of the same attention, where they are at hand; otherwise they are computed.

    Returns
    -------
    Effect of each key and head, shape (Tk, H), float32; sum over heads and layers for the effect of a gene. In
    self-attention the key's own query goes with it and does not count. Where a key holds all of a query's attention
    (above 1 - 1e-6) the query's output falls to 0. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        If `grad_out` does not fit `q`; and as :func:`scfm.ops.attention`.

    Examples
    --------
    >>> import torch, scfm
    >>> q, k, v = torch.randn(3, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    >>> whole, grad_out = torch.tensor([0, 4]), torch.zeros(4, 1, 8)
    >>> grad_out[0] = 1  # the function: the sum of the first token's output
    >>> effects = scfm.ops.deletion_effects(q, k, v, whole, grad_out)
    >>> out = scfm.ops.attention(q, k, v, whole)[0].sum()
    >>> without_last = scfm.ops.attention(q[:3], k[:3], v[:3], torch.tensor([0, 3]))[0].sum()
    >>> torch.allclose(effects[3, 0], without_last - out, atol=1e-5)
    True
    """
    check_qkv(q, k, v)
    q, k, v = readable(q), readable(k), readable(v)
    if grad_out.shape != q.shape or grad_out.dtype != q.dtype:
        raise ValueError(
            f"`grad_out` is {grad_out.dtype} of shape {tuple(grad_out.shape)} and `q` {q.dtype} of shape "
            f"{tuple(q.shape)}; they must agree."
        )
    bias_TH = None if key_bias is None else check_key_bias(key_bias, k)
    plan = checked_plan(plan, cu_seqlens, cu_seqlens_k, n_known, q, k)
    scale = check_scale(scale, q)
    if out is None or lse is None:
        out, lse = attention(
            q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, n_known=n_known, key_bias=key_bias, scale=scale, plan=plan,
            return_lse=True, backend=backend,
        )  # fmt: skip
    bounds = (plan.cu_seqlens, plan.cu_seqlens_k, plan.n_known, bias_TH, scale)
    if choose_backend(backend, q, options=options_of(plan, bias_TH), operator="deletion_effects") == "fused":
        return torch.ops.scfm.attention_deletion_effects(grad_out.contiguous(), q, k, v, out, lse, *bounds)
    return reference.deletion_effects(grad_out, q, k, v, out, *bounds)


def _checked_pairs(pairs: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`pairs` is {pairs.dtype} of shape {tuple(pairs.shape)}; it must hold integer (query, key) "
            "rows, shape (P, 2)."
        )
    limits = torch.tensor([q.shape[0], k.shape[0]], device=pairs.device)
    outside = ((pairs < 0) | (pairs >= limits)).any(-1).nonzero()
    if outside.numel():
        query, key = pairs[int(outside[0])].tolist()
        raise ValueError(
            f"`pairs` names query {query} and key {key}, but there are {q.shape[0]} queries and {k.shape[0]} keys; "
            "count tokens from the start of the batch."
        )
    return pairs.long()


def _pair_scores(
    q: Tensor, k: Tensor, pairs_P2: Tensor, lse: Tensor, plan: AttentionPlan, bias_TH: Tensor | None, scale: float
) -> Tensor:
    query_P, key_P = pairs_P2.T.contiguous()
    scores_PH = (q[query_P].float() * k[key_P].float()).sum(-1) * scale
    if bias_TH is not None:
        scores_PH = scores_PH + bias_TH[key_P]
    bounds = plan.cu_seqlens.to(q.device)
    bounds_k = bounds if plan.cu_seqlens_k is None else plan.cu_seqlens_k.to(q.device)
    cell_P = torch.searchsorted(bounds, query_P, right=True) - 1
    seen_P = (key_P >= bounds_k[cell_P]) & (key_P < bounds_k[cell_P + 1])
    if plan.n_known is not None:
        known_P = key_P - bounds_k[cell_P] < plan.n_known.to(q.device)[cell_P]
        seen_P = seen_P & (known_P | (key_P == query_P))
    lse_PH = lse[query_P]
    probs_PH = torch.exp(scores_PH - torch.where(lse_PH == -math.inf, math.inf, lse_PH))
    return torch.where(seen_P[:, None], probs_PH, 0.0)
