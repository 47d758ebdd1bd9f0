"""Linear attention by random features (FAVOR+) on packed cells, for the scBERT and scFoundation families."""

# Axes: B cells, T packed tokens, H heads, K head width, M random features, L longest cell.

from __future__ import annotations

import torch
from torch import Tensor

from scfm.ops.attention import check_qkv
from scfm.ops.plan import AttentionPlan, make_plan

# Added to every feature, so that no query is without weight.
FEATURE_FLOOR = 1e-4


def random_projection(n_features: int, head_dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw the projection of the random features: blocks of orthogonal rows with chi-distributed norms.

    Parameters
    ----------
    n_features
        Number of features; `int(head_dim * log(head_dim))` upstream.
    head_dim
        Head width.
    generator
        Source of randomness; torch's global one by default.

    Returns
    -------
    Projection (n_features, head_dim), float32.

    Notes
    -----
    Performer (Choromanski et al. 2021): rows of one block are orthogonal, which lowers the variance, and each row has
    the norm of an independent Gaussian vector, which keeps the estimate unbiased.

    Examples
    --------
    >>> import torch, scfm
    >>> projection = scfm.ops.random_projection(8, 8, generator=torch.Generator().manual_seed(0))
    >>> products = projection @ projection.T
    >>> bool((products - products.diag().diag()).abs().max() < 1e-5)  # rows of a block are orthogonal
    True
    """
    if n_features < 1 or head_dim < 1:
        raise ValueError(f"`n_features` is {n_features} and `head_dim` {head_dim}; both must be at least 1.")
    blocks = []
    for begin in range(0, n_features, head_dim):
        orthogonal, _ = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))
        blocks.append(orthogonal.T[: n_features - begin])
    norms_M = torch.randn(n_features, head_dim, generator=generator).norm(dim=1)
    return torch.cat(blocks) * norms_M[:, None]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    projection: Tensor,
    *,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attention of each cell through positive random features, at a cost linear in its length.

    Parameters
    ----------
    q, k, v
        Queries, keys and values, shape (T, H, K), one real dtype.
    cu_seqlens
        Cell boundaries, shape (B + 1,), int32 or int64, first 0, last T.
    projection
        Random projection W, shape (M, K), as of :func:`random_projection`.
    plan
        :func:`scfm.ops.make_plan` of the same boundaries; without it the op builds one.

    Returns
    -------
    Output (T, H, K) in the dtype of `q`; differentiable. Features and their sums are float32 at least.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or boundaries do not fit.

    Notes
    -----
    With x' = x K^(-1/4): phi(x) = M^(-1/2) (exp(W x' - |x'|^2 / 2 - c) + 1e-4) and out = phi(q) (phi(K)^T V) /
    (phi(q) sum phi(K)), as in Performer (Choromanski et al. 2021). The stabiliser c is the maximum of W x' over the row
    for queries, and over the cell and head for keys; published code takes the latter over the whole batch, so that a cell's
    result depends on its batch-mates.

    Examples
    --------
    >>> import torch, scfm
    >>> generator = torch.Generator().manual_seed(0)
    >>> q, k, v = torch.randn(3, 5, 2, 8, generator=generator) / 2
    >>> projection = scfm.ops.random_projection(4096, 8, generator=generator)
    >>> cu_seqlens = torch.tensor([0, 3, 5])
    >>> approximate = scfm.ops.linear_attention(q, k, v, cu_seqlens, projection)
    >>> float((approximate - scfm.ops.attention(q, k, v, cu_seqlens)).abs().max()) < 0.05
    True
    """
    check_qkv(q, k, v)
    if projection.dim() != 2 or projection.shape[1] != q.shape[2]:
        raise ValueError(
            f"`projection` has shape {tuple(projection.shape)}; it must be (features, {q.shape[2]}), the head width."
        )
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"`q` has {q.shape[0]} tokens and `k` {k.shape[0]}; linear attention is self-attention.")
    if plan is None:
        plan = make_plan(cu_seqlens, n_tokens=q.shape[0])
    lengths = plan.cu_seqlens.diff().tolist()
    dtype = torch.promote_types(q.dtype, torch.float32)
    weight_MK = projection.to(device=q.device, dtype=dtype) * q.shape[2] ** -0.25
    outs = [
        _cell_attention(query.to(dtype), key.to(dtype), value.to(dtype), weight_MK)
        for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths))
    ]
    return torch.cat(outs).to(q.dtype) if outs else torch.empty_like(q)


def _cell_attention(query_LHK: Tensor, key_LHK: Tensor, value_LHK: Tensor, weight_MK: Tensor) -> Tensor:
    query_HLM = _features(query_LHK.transpose(0, 1), weight_MK, over=(-1,))
    key_HLM = _features(key_LHK.transpose(0, 1), weight_MK, over=(-2, -1))
    summary_HMK = key_HLM.mT @ value_LHK.transpose(0, 1)
    weight_HL1 = query_HLM @ key_HLM.sum(-2)[..., None]
    return (query_HLM @ summary_HMK / weight_HL1).transpose(0, 1)


def _features(x_HLK: Tensor, weight_MK: Tensor, *, over: tuple[int, ...]) -> Tensor:
    projected_HLM = x_HLK @ weight_MK.T
    half_norm_HL1 = x_HLK.square().sum(-1, keepdim=True) * (0.5 * x_HLK.shape[-1] ** -0.5)
    # Constant for the gradient: it cancels between numerator and denominator but for the floor.
    stabiliser = projected_HLM.detach().amax(over, keepdim=True) if projected_HLM.numel() else 0.0
    n_features = weight_MK.shape[0]
    return (torch.exp(projected_HLM - half_norm_HL1 - stabiliser) + FEATURE_FLOOR) * n_features**-0.5
