"""Attention probabilities of chosen pairs or summed per key, and the effect of deleting a key, without a matrix of scores."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width, P pairs.

from __future__ import annotations

import math
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from scfm.ops.attention import attention
from scfm.ops.backend import choose_backend
from scfm.ops.options import (
    AttentionOptions,
    OperatorOptions,
    check_options,
    check_qkv,
    full_precision,
    readable,
    refuse_tangents,
    with_options,
)
from scfm.ops.reference import keys as reference

# A probability has the relative error eps |log-sum-exp|. The kernel divides by 1 - P while that costs less than
# `MAX_ERROR`, and never at less than `MIN_ROOM`. Above `MAX_LSE` the sum of squares is not precise enough to tell.
MAX_ERROR = 1e-5
MIN_ROOM = 1 / 16
MAX_LSE = 1e4


@torch.no_grad()
@with_options
def attention_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    *,
    pairs: Tensor | None = None,
    head_mean: bool = False,
    lse: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Attention probabilities of chosen pairs of tokens, or each key's sum over the queries of its cell.

    Parameters
    ----------
    q, k
        Queries (Tq, H, K) and keys (Tk, H, K), of one real dtype.
    cu_seqlens
        Cell boundaries of the queries, shape (B + 1,), int32 or int64, first 0, last Tq.
    pairs
        Token numbers (query, key), shape (P, 2), counted from the start of the batch; None for each key's sum over
        queries.
    head_mean
        Whether to average over heads.
    lse
        Log-sum-exp (Tq, H) of the same attention, if it is already known; otherwise it is computed.
    {options}

    Returns
    -------
    Probabilities (P, H), or column sums (Tk, H); without the last axis with `head_mean`. float32 (float64 for float64). A pair
    across cells, or hidden by the mask, has probability 0. Not differentiable.

    Raises
    ------
    ValueError
        If shapes do not fit or a pair has a token number out of range; and as :func:`scfm.ops.attention`.
    NotImplementedError
        If it is differentiated in forward mode.

    Examples
    --------
    >>> import torch, scfm
    >>> q, k = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    >>> cu_seqlens = torch.tensor([0, 3, 5])
    >>> pairs = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 4]])
    >>> probability_P = scfm.ops.attention_scores(q, k, cu_seqlens, pairs=pairs, head_mean=True)
    >>> round(float(probability_P[:3].sum()), 4), float(probability_P[3])  # token 4 belongs to another cell
    (1.0, 0.0)
    """
    check_qkv(q, k, k)
    refuse_tangents("attention_scores", q, k, options.get("key_bias"))
    q, k = readable(q), readable(k)
    checked, backend = check_options(q, k, cu_seqlens, options)
    fused = pairs is None and choose_backend(backend, q, options=checked.in_use, operator="column_sums") == "fused"
    if lse is None and (pairs is not None or fused):
        lse = attention(q, k, k, cu_seqlens, return_lse=True, **options)[1]
    if pairs is not None:
        assert lse is not None
        with full_precision(q.device):
            probs = _pair_scores(q, k, _checked_pairs(pairs, q, k), lse, checked)
    elif fused:
        probs = torch.ops.scfm.attention_column_sums(q, k, lse, *checked.arguments)
    else:
        with full_precision(q.device):
            probs = reference.column_sums(q, k, checked)
    return probs.mean(-1) if head_mean else probs


@torch.no_grad()
@with_options
def deletion_effects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    grad_out: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Estimate the change of a function of the outputs if a key is deleted, for all keys at the cost of about one backward pass.

    Let a_ig be the probability of key g for query i, o_i the output, and G_i the gradient of the function with respect to o_i.
    The estimate for key g is `sum over i != g of a_ig / (1 - a_ig) G_i . (o_i - v_g)`. The change of the outputs is exact (the
    softmax without key g in closed form), and the function is approximated to first order.

    Parameters
    ----------
    q, k, v
        Queries (Tq, H, K), keys and values (Tk, H, K), of one real dtype.
    cu_seqlens
        Cell boundaries of the queries, shape (B + 1,), int32 or int64, first 0, last Tq.
    grad_out
        Gradient of the function with respect to the outputs, shape (Tq, H, K), dtype of `q`.
    out, lse
        Output and log-sum-exp of the same attention in float32, if both are already known. Otherwise they are computed; for
        16-bit tensors they are always computed.
    {options}

    Returns
    -------
    Effect of each key and head, shape (Tk, H), float32 (float64 for float64); sum over heads and layers for the effect of a
    gene. In self-attention the key's own query is deleted with it and does not count. If a query attends to no other key,
    its output becomes 0. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        If `grad_out` does not fit `q`; and as :func:`scfm.ops.attention`.
    NotImplementedError
        If it is differentiated in forward mode.

    Notes
    -----
    If a key has almost all the attention of a query, 1 - a_ig is inaccurate. For such queries the mean value of the other
    keys is computed separately, and the effect is `a_ig G_i . (mean - v_g)`. All computations are at least in float32, also
    for 16-bit tensors, because an output rounded to 16 bits is too coarse for the effect of one key.

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
    refuse_tangents("deletion_effects", q, k, v, grad_out, options.get("key_bias"))
    if q.dtype.itemsize < 4:
        q, k, v, grad_out = (tensor.float() for tensor in (q, k, v, grad_out))
        out = lse = None
    checked, backend = check_options(q, k, cu_seqlens, options)
    name = choose_backend(backend, q, options=checked.in_use, operator="deletion_effects")
    with full_precision(q.device):
        if name != "fused":
            return reference.deletion_effects(grad_out, q, k, v, checked)
        if out is None or lse is None:
            out, lse = attention(q, k, v, cu_seqlens, return_lse=True, **options)
        return _fused_deletion_effects(grad_out, q, k, v, out, lse, checked)


def _fused_deletion_effects(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: OperatorOptions
) -> Tensor:
    """By the kernel, whose 1 - P must not cancel; queries with a dominant key go to plain torch."""
    is_sharp_TH = _sharp_queries(q, k, v, lse, options)
    sharp_queries_T = is_sharp_TH.any(1)
    if not bool(sharp_queries_T.any()):
        return torch.ops.scfm.attention_deletion_effects(grad_out.contiguous(), q, k, v, out, lse, *options.arguments)
    smooth = grad_out.masked_fill(is_sharp_TH[..., None], 0.0)
    effects_TH = torch.ops.scfm.attention_deletion_effects(smooth, q, k, v, out, lse, *options.arguments)
    sharp = grad_out.masked_fill(~is_sharp_TH[..., None], 0.0)
    return effects_TH + reference.deletion_effects(sharp, q, k, v, options, of_queries_T=sharp_queries_T)


def _sharp_queries(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, options: OperatorOptions) -> Tensor:
    """Queries (Tq, H) of which a key may have so much attention that 1 - P loses more than `MAX_ERROR` of its value.

    The largest probability is at most the root of their sum of squares, and the log-sum-exp of the doubled scores less
    twice that of the scores is the logarithm of this sum.
    """
    bias = options.key_bias
    doubled = replace(options, scale=2.0 * options.scale, key_bias=None if bias is None else 2.0 * bias)
    lse_of_squares = torch.ops.scfm.attention_forward(q, k, v, *doubled.arguments)[1]
    largest_TH = torch.exp(0.5 * lse_of_squares - lse)
    error_TH = lse.abs().clamp(min=1.0) * torch.finfo(lse.dtype).eps
    room_TH = (error_TH / MAX_ERROR).clamp(min=MIN_ROOM, max=0.5)
    return (largest_TH > 1.0 - room_TH) | (lse.isfinite() & (lse.abs() > MAX_LSE))


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
            f"`pairs` holds query {query} and key {key}, but there are {q.shape[0]} queries and {k.shape[0]} keys; "
            "count tokens from the start of the batch."
        )
    return pairs.long()


def _pair_scores(q: Tensor, k: Tensor, pairs_P2: Tensor, lse: Tensor, options: OperatorOptions) -> Tensor:
    query_P, key_P = pairs_P2.T.contiguous()
    scores_PH = (q[query_P].float() * k[key_P].float()).sum(-1) * options.scale
    if options.key_bias is not None:
        scores_PH = scores_PH + options.key_bias[key_P]
    bounds = options.cu_seqlens.to(q.device)
    bounds_k = bounds if options.cu_seqlens_k is None else options.cu_seqlens_k.to(q.device)
    cell_P = torch.searchsorted(bounds, query_P, right=True) - 1
    allowed_P = (key_P >= bounds_k[cell_P]) & (key_P < bounds_k[cell_P + 1])
    if options.n_known is not None:
        context_P = key_P - bounds_k[cell_P] < options.n_known.to(q.device)[cell_P]
        allowed_P = allowed_P & (context_P | (key_P == query_P))
    lse_PH = lse[query_P]
    probs_PH = torch.exp(scores_PH - torch.where(lse_PH == -math.inf, math.inf, lse_PH))
    return torch.where(allowed_P[:, None], probs_PH, 0.0)
