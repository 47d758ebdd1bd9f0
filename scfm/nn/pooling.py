"""Pooling of token states to one vector per cell."""

# Axes: B cells, T packed tokens, D model width.

from __future__ import annotations

import torch
from torch import Tensor

RANK_OF_HALF_WEIGHT = 50


def expression_weights(position_T: Tensor, values_T: Tensor | None) -> Tensor:
    """Return the weight of each token in a mean weighted by expression, shape (T,), float32.

    The weight is the value of the token (0 for a masked one), or 1 / (1 + rank / 50) if the encoding has no values. In a mean
    without weights, a gene with one count would have as much influence as the most specific marker.
    """
    if values_T is not None:
        return values_T.float().clamp(min=0)
    return RANK_OF_HALF_WEIGHT / (RANK_OF_HALF_WEIGHT + position_T.float())


def pool_cells(
    states_TD: Tensor,
    cu_seqlens: Tensor,
    keep_T: Tensor | None = None,
    *,
    how: str = "mean",
    weight_T: Tensor | None = None,
) -> Tensor:
    """Pool the token states of each cell.

    Parameters
    ----------
    states_TD
        Token states, shape (T, D).
    cu_seqlens
        Cell boundaries, shape (B + 1,).
    keep_T
        Tokens to pool, shape (T,), bool; None for all. Ignored by `"cls"`.
    how
        `"mean"` or `"max"` over the tokens to pool; `"weighted"` for their mean with `weight_T`; `"cls"` for the state of each
        cell's first token; `"concat"` for four concatenated vectors as in scFoundation: last token (source depth), second last
        (target depth), max and mean.
    weight_T
        Weights of the tokens in a `"weighted"` mean, shape (T,), at least 0; see `expression_weights`.

    Returns
    -------
    Vectors of the cells, shape (B, D), or (B, 4 D) for `"concat"`; means are float32. A cell without tokens to pool has
    zeros.
    """
    if how == "cls":
        return states_TD.index_select(0, cu_seqlens[:-1].long())
    if how == "concat":
        last_B = cu_seqlens[1:].long() - 1
        extremes = [pool_cells(states_TD, cu_seqlens, keep_T, how=part) for part in ("max", "mean")]
        return torch.cat([states_TD.index_select(0, last_B), states_TD.index_select(0, last_B - 1), *extremes], -1)
    if how == "max":
        kept_TD = states_TD if keep_T is None else states_TD.masked_fill(~keep_T[:, None], -torch.inf)
        pooled_BD = torch.segment_reduce(kept_TD, "max", lengths=cu_seqlens.diff().long(), unsafe=True)
        return pooled_BD.masked_fill(pooled_BD.isneginf(), 0.0)
    if how not in ("mean", "weighted"):
        raise ValueError(f"The pooling is {how!r}; choose 'mean', 'weighted', 'max', 'cls' or 'concat'.")
    if how == "weighted":
        assert weight_T is not None
        keep_T = weight_T if keep_T is None else weight_T * keep_T
    return _mean(states_TD.float(), cu_seqlens.long(), keep_T)


def _mean(states_TD: Tensor, cu_seqlens: Tensor, weight_T: Tensor | None) -> Tensor:
    """Mean of the states of each cell; tokens count as much as their weights, which may be bool, or equally for None."""
    total_B = lengths_B = cu_seqlens.diff()
    if weight_T is not None:
        states_TD = states_TD * weight_T[:, None]
        total_B = torch.segment_reduce(weight_T.float(), "sum", lengths=lengths_B, unsafe=True)
    sum_BD = torch.segment_reduce(states_TD, "sum", lengths=lengths_B, unsafe=True)
    return sum_BD / total_B.masked_fill(total_B == 0, 1)[:, None]
