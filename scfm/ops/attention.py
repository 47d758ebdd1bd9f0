"""`attention`: softmax attention of packed cells, by the fused kernels where they are, by plain torch elsewhere."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width.

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from scfm.ops import registration
from scfm.ops.backend import choose_backend
from scfm.ops.plan import AttentionPlan, make_plan

Backend = Literal["auto", "fused", "torch"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = ...,
    n_known: Tensor | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    plan: AttentionPlan | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = ...,
    n_known: Tensor | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    plan: AttentionPlan | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = ...,
    n_known: Tensor | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    plan: AttentionPlan | None = ...,
    return_lse: bool,
    backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    n_known: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within each cell of a packed batch, without padding and without a mask tensor.

    Parameters
    ----------
    q, k, v
        Queries (Tq, H, K), keys and values (Tk, H, K), one real dtype. Views of a packed (T, 3, H, K) projection are
        read in place: only the last axis must be contiguous.
    cu_seqlens
        Cell boundaries of the queries, shape (B + 1,), int32 or int64, first 0, last Tq.
    cu_seqlens_k
        Cell boundaries of the keys, shape (B + 1,), last Tk, for cross-attention (a few latents over a cell's genes).
        Without it keys and queries share `cu_seqlens`.
    n_known
        The generative mask, shape (B,), int32 or int64: the first `n_known` tokens of a cell are known, every query
        sees those, and an unknown token sees itself as well. Self-attention only.
    key_bias
        Added to every score of a key after scaling, shape (Tk,) or (Tk, H), any real dtype; differentiable.
        `-inf` hides a key.
    scale
        Factor on the scores; K ** -0.5 by default.
    plan
        :func:`scfm.ops.make_plan` of the same boundaries, built once a batch; without it the op builds one.
    return_lse
        Return the natural log-sum-exp of each query's scores too; differentiable.
    backend
        `"fused"` (compiled kernels), `"torch"` (plain torch), or `"auto"`: the faster one for the case, as measured. On a
        GPU `"auto"` takes a fused kernel only where the record of passed device tests has the case; `"fused"` forces it,
        with a warning.

    Returns
    -------
    Output (Tq, H, K) in the dtype of `q`; with `return_lse` also the log-sum-exp (Tq, H), float32. A query that sees no
    key has output 0, log-sum-exp -inf and gradients 0. Under autocast `q`, `k` and `v` are cast as for torch's own.

    Raises
    ------
    TypeError
        If dtypes differ or are not real floating point.
    ValueError
        If shapes, devices, boundaries or `n_known` do not fit.
    RuntimeError
        If `backend="fused"` is asked for where it cannot serve.

    Notes
    -----
    On the CPU the result of a cell does not depend, bitwise, on the other cells of the batch or on the number of
    threads. On a GPU gradients of `q` are summed in no fixed order, unless `torch.use_deterministic_algorithms` is on. Scores are never held for a whole cell at once (FlashAttention, Dao 2023); the generative mask is that
    of scGPT (Cui et al. 2024).

    Examples
    --------
    >>> import torch
    >>> from scfm import ops
    >>> q, k, v = torch.randn(3, 5, 2, 16)
    >>> ops.attention(q, k, v, torch.tensor([0, 2, 5])).shape
    torch.Size([5, 2, 16])
    """
    q, k, v = autocast_qkv(q, k, v)
    check_qkv(q, k, v)
    q, k, v = readable(q), readable(k), readable(v)
    bias_TH = None if key_bias is None else check_key_bias(key_bias, k)
    plan = checked_plan(plan, cu_seqlens, cu_seqlens_k, n_known, q, k)
    scale = check_scale(scale, q)
    name = choose_backend(backend, q, options=options_of(plan, bias_TH))
    bounds = (plan.cu_seqlens, plan.cu_seqlens_k, plan.n_known)
    if name == "fused":
        out, lse = torch.ops.scfm.attention_forward(q, k, v, *bounds, bias_TH, scale)
    elif name == "flash":
        out, lse = torch.ops.scfm.flash_attention_forward(q, k, v, *bounds, bias_TH, scale)
    else:
        out, lse = torch.ops.scfm.torch_attention_forward(q, k, v, *bounds, bias_TH, scale, return_lse)
    return (out, lse) if return_lse else out


def checked_plan(
    plan: AttentionPlan | None,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    n_known: Tensor | None,
    q: Tensor,
    k: Tensor,
) -> AttentionPlan:
    """The given plan if it fits the arguments, or one made of them."""
    if plan is None:
        if torch.compiler.is_compiling():
            # Values cannot be looked at while a graph is traced; the op itself checks them when the graph runs.
            return AttentionPlan(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, n_known=n_known)
        return make_plan(
            cu_seqlens, cu_seqlens_k=cu_seqlens_k, n_known=n_known, n_tokens=q.shape[0], n_tokens_k=k.shape[0]
        )
    if plan.cu_seqlens.shape != cu_seqlens.shape:
        raise ValueError(
            f"`plan` was made for {plan.n_cells} cells and `cu_seqlens` holds {cu_seqlens.shape[0] - 1}; "
            "make one plan a batch."
        )
    for name, planned, given in (("cu_seqlens_k", plan.cu_seqlens_k, cu_seqlens_k), ("n_known", plan.n_known, n_known)):
        if (planned is None) != (given is None):
            raise ValueError(
                f"`plan` was made {'without' if planned is None else 'with'} `{name}`, the call is "
                f"{'without' if given is None else 'with'} it; pass the same boundaries to both."
            )
    return plan


def options_of(plan: AttentionPlan, key_bias: Tensor | None) -> frozenset[str]:
    """Names of the options in use, as the record of device tests lists them."""
    used = {"cross": plan.cu_seqlens_k, "generative": plan.n_known, "key_bias": key_bias}
    return frozenset(name for name, value in used.items() if value is not None)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}; it must be (tokens, heads, head width). "
                "Pack the cells end to end."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` holds {tensor.dtype}; pass real floating point.")
        if tensor.dtype != q.dtype:
            raise TypeError(f"`{name}` holds {tensor.dtype} and `q` {q.dtype}; bring them to one dtype.")
        if tensor.device != q.device:
            raise ValueError(f"`{name}` is on {tensor.device} and `q` on {q.device}; bring them to one device.")
        if tensor.shape[1:] != q.shape[1:]:
            raise ValueError(
                f"`{name}` has (heads, head width) {tuple(tensor.shape[1:])} and `q` {tuple(q.shape[1:])}; "
                "they must agree."
            )
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"`k` has {k.shape[0]} tokens and `v` {v.shape[0]}; they must agree.")
    if q.shape[2] == 0:
        raise ValueError("The head width is 0; it must be at least 1.")


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous, a copy where it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def check_key_bias(key_bias: Tensor, k: Tensor) -> Tensor:
    """The bias as (Tk, H)."""
    if not key_bias.is_floating_point():
        raise TypeError(f"`key_bias` holds {key_bias.dtype}; pass real floating point.")
    if key_bias.device != k.device:
        raise ValueError(f"`key_bias` is on {key_bias.device} and `k` on {k.device}; bring them to one device.")
    n_tokens, n_heads = k.shape[:2]
    if key_bias.shape not in ((n_tokens,), (n_tokens, n_heads)):
        raise ValueError(
            f"`key_bias` has shape {tuple(key_bias.shape)}; it must be ({n_tokens},) or ({n_tokens}, {n_heads}): "
            "one number a key, or one a key and head."
        )
    bias = key_bias if k.dtype == torch.float64 else key_bias.float()
    return bias[:, None].expand(n_tokens, n_heads) if bias.dim() == 1 else bias


def check_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return float(q.shape[2] ** -0.5)
    if not math.isfinite(scale):
        raise ValueError(f"`scale` is {scale}; it must be finite. Leave it out for head width ** -0.5.")
    return float(scale)


def autocast_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the dtype that autocast asks for."""
    device = q.device.type
    usable = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not usable or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    n_known: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` in plain torch: the same arguments, every option, exact gradients.

    Parameters
    ----------
    q, k, v, cu_seqlens, cu_seqlens_k, n_known, key_bias, scale, plan, return_lse
        As for :func:`scfm.ops.attention`.

    Examples
    --------
    >>> import torch, scfm
    >>> q, k, v = torch.randn(3, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    >>> cu_seqlens = torch.tensor([0, 3, 5])
    >>> out = scfm.ops.attention(q, k, v, cu_seqlens)
    >>> torch.allclose(out, scfm.ops.attention_reference(q, k, v, cu_seqlens), atol=1e-5)
    True
    """
    return attention(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        n_known=n_known,
        key_bias=key_bias,
        scale=scale,
        plan=plan,
        return_lse=return_lse,
        backend="torch",
    )


registration.register()
