"""Linear attention by random features (FAVOR+) on packed cells, for the scBERT and scFoundation families."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width, M random features, L tokens of one cell.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm.ops.attention import no_second_derivative
from scfm.ops.backend import EXTENSION_PATH, choose_backend
from scfm.ops.layout import Layout, lay_out
from scfm.ops.options import (
    AttentionOptions,
    Backend,
    autocast_qkv,
    check_options,
    check_qkv,
    full_precision,
    has_tangent,
    readable,
)
from scfm.ops.plan import AttentionPlan

# Added to every feature, so that the sum of weights of a query is never 0.
FEATURE_FLOOR = 1e-4
CHUNK = 128  # tokens of one matrix product on a GPU


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
    cu_seqlens_k: Tensor | None = None,
    plan: AttentionPlan | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of each cell by positive random features, at a cost linear in its length.

    Parameters
    ----------
    q, k, v
        Queries (Tq, H, K), keys and values (Tk, H, K), of one real dtype. Under autocast they are cast as torch casts them. A
        tensor whose last axis is not contiguous is copied.
    cu_seqlens
        Cell boundaries of the queries, shape (B + 1,), int32 or int64, first 0, last Tq.
    projection
        Random projection W, shape (M, K), as of :func:`random_projection`.
    cu_seqlens_k
        Cell boundaries of the keys, shape (B + 1,), last Tk; without it keys and queries share `cu_seqlens`.
    plan
        :func:`scfm.ops.make_plan` of the same boundaries; without it the op builds one.
    backend
        `"fused"` (compiled kernels, on the CPU), `"torch"` (plain torch), or `"auto"`: the kernels if they support the call.

    Returns
    -------
    Output (Tq, H, K) in the dtype of `q`; differentiable in `q`, `k` and `v`, and with `"torch"` in `projection` too. A
    query without keys has output 0.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or boundaries do not fit.
    RuntimeError
        If `backend="fused"` is asked for and the kernels do not support the call.

    Notes
    -----
    With x' = x K^(-1/4): phi(x) = M^(-1/2) (exp(W x' - |x'|^2 / 2 - c) + 1e-4) and out = phi(q) (phi(K)^T V) /
    (phi(q) sum phi(K)), as in Performer (Choromanski et al. 2021). The stabilizer c is the maximum of W x' over the row
    for queries, and over the cell and head for keys. The published code takes the maximum for keys over the whole batch, so that
    the result of a cell depends on the rest of the batch. The gradient treats c as a constant.

    Exponents, sums and the constant 1e-4 are at least float32. For bfloat16 tensors the kernels round W, features and sums to
    bfloat16 before a product, which makes their error 1.3 to 5 times that of `"torch"`. The features of a whole cell are
    never in memory, and there are no second derivatives. Forward-mode differentiation uses plain torch.
    On a GPU, plain torch computes all cells together, in chunks of 128 tokens that belong to one cell.

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
    q, k, v = autocast_qkv(q, k, v)
    check_qkv(q, k, v)
    if projection.dim() != 2 or projection.shape[1] != q.shape[2] or not projection.shape[0]:
        raise ValueError(
            f"`projection` has shape {tuple(projection.shape)}; it must be (features, {q.shape[2]}), the head width."
        )
    options: AttentionOptions = {"cu_seqlens_k": cu_seqlens_k, "plan": plan}
    bounds, _ = check_options(q, k, cu_seqlens, options)
    if _uses_kernels(q, k, v, projection, backend):
        weight_MK = projection.detach().to(device=q.device, dtype=torch.float32).contiguous()
        return torch.ops.scfm.linear_attention_forward(
            readable(q), readable(k), readable(v), bounds.cu_seqlens, bounds.cu_seqlens_k, weight_MK, FEATURE_FLOOR
        )
    if q.is_cuda:
        layout = None if plan is None else plan.layout
        if layout is None or layout.device != q.device:
            layout = lay_out(bounds.cu_seqlens, bounds.cu_seqlens_k, None).to(q.device)
        with torch.autocast(q.device.type, enabled=False):
            return in_chunks(q, k, v, projection, layout)
    bounds_k = bounds.cu_seqlens if bounds.cu_seqlens_k is None else bounds.cu_seqlens_k
    lengths, lengths_k = bounds.cu_seqlens.diff().tolist(), bounds_k.diff().tolist()
    dtype = torch.promote_types(q.dtype, torch.float32)
    weight_MK = projection.to(device=q.device, dtype=dtype) * q.shape[2] ** -0.25
    with full_precision(q.device):
        outs = [
            _cell_attention(query.to(dtype), key.to(dtype), value.to(dtype), weight_MK)
            for query, key, value in zip(q.split(lengths), k.split(lengths_k), v.split(lengths_k))
        ]
    return torch.cat(outs).to(q.dtype) if outs else _zeros_of(q, k, v)


def _uses_kernels(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, backend: Backend) -> bool:
    """Whether the kernels support the call, and are asked for."""
    obstacle = None
    if q.is_cuda:
        obstacle = "linear attention has no kernel for GPUs"
    elif projection.requires_grad and torch.is_grad_enabled():
        obstacle = "the kernels compute no gradient of the projection"
    elif has_tangent(q, k, v, projection):
        obstacle = "the kernels cannot be differentiated in forward mode"
    if obstacle is not None:
        if backend == "fused":
            raise RuntimeError(f'`backend="fused"` does not support this call: {obstacle}. Pass `backend="auto"`.')
        backend = "torch" if backend == "auto" else backend
    return choose_backend(backend, q) == "fused"


def _cell_attention(query_LHK: Tensor, key_LHK: Tensor, value_LHK: Tensor, weight_MK: Tensor) -> Tensor:
    if not key_LHK.shape[0] or not query_LHK.shape[0]:
        return _zeros_of(query_LHK, key_LHK, value_LHK)
    query_HLM = _features(query_LHK.transpose(0, 1), weight_MK, over=(-1,))
    key_HLM = _features(key_LHK.transpose(0, 1), weight_MK, over=(-2, -1))
    summary_HMK = key_HLM.mT @ value_LHK.transpose(0, 1)
    weight_HL1 = query_HLM @ key_HLM.sum(-2)[..., None]
    return (query_HLM @ summary_HMK / weight_HL1).transpose(0, 1)


def in_chunks(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, layout: Layout) -> Tensor:
    """Linear attention in a number of launches that no number of cells changes, for GPUs.

    Tokens are brought into chunks that hold tokens of one cell each, the last one of a cell padded with zeros. All products are
    those of chunks; the summaries of the chunks of a cell are added up. Arguments as of :func:`linear_attention`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    weight_MK = projection.to(device=q.device, dtype=dtype) * q.shape[2] ** -0.25
    sections = layout.sections()
    queries = _Chunks.of(sections.cu_q, q.shape[0])
    keys = queries if layout.is_self_attention else _Chunks.of(sections.cu_k, k.shape[0])
    n_cells = len(sections.cu_q) - 1
    projected_THM = k.detach().to(dtype) @ weight_MK.detach().T
    largest_BH = projected_THM.new_full((n_cells, k.shape[1]), -torch.inf)
    largest_BH.scatter_reduce_(0, keys.cell_T[:, None].expand(-1, k.shape[1]), projected_THM.amax(-1), "amax")
    key_THM = _features(k.to(dtype), weight_MK, stabilizer=largest_BH[keys.cell_T][..., None])
    query_THM = _features(q.to(dtype), weight_MK, over=(-1,))
    # The last column sums the weights of a query.
    value_THX = torch.nn.functional.pad(v.to(dtype), (0, 1), value=1.0)
    summary_CHMX = keys.cut(key_THM).mT @ keys.cut(value_THX)
    summary_BHMX = summary_CHMX.new_zeros((n_cells, *summary_CHMX.shape[1:])).index_add(0, keys.cell_C, summary_CHMX)
    out_THX = queries.joined(queries.cut(query_THM) @ summary_BHMX[queries.cell_C])
    weight_TH1 = out_THX[..., -1:]
    return (out_THX[..., :-1] / torch.where(weight_TH1 > 0, weight_TH1, 1.0)).to(q.dtype)


@dataclass(frozen=True)
class _Chunks:
    """Tokens in chunks of `CHUNK` rows; tensors on the device."""

    cell_T: Tensor  # cell of each token
    row_T: Tensor  # row of each token among those of all chunks
    cell_C: Tensor  # cell of each chunk

    @classmethod
    def of(cls, cu_seqlens: Tensor, n_tokens: int) -> _Chunks:
        """Cut cells; of the chunks that there may be at most, those that no cell needs stay empty."""
        n_cells, device = len(cu_seqlens) - 1, cu_seqlens.device
        token_T = torch.arange(n_tokens, dtype=cu_seqlens.dtype, device=device)
        cell_T = torch.searchsorted(cu_seqlens, token_T, right=True) - 1
        ends_B = ((cu_seqlens.diff() + CHUNK - 1) // CHUNK).cumsum(0)
        starts_B = torch.nn.functional.pad(ends_B, (1, 0))[:-1]
        number_C = torch.arange(n_tokens // CHUNK + n_cells, device=device)
        cell_C = torch.searchsorted(ends_B, number_C, right=True).clamp(max=max(0, n_cells - 1))
        return cls(cell_T, starts_B[cell_T] * CHUNK + token_T - cu_seqlens[cell_T], cell_C)

    def cut(self, tensor_THX: Tensor) -> Tensor:
        """(C, H, CHUNK, X), with zeros where a chunk has no token."""
        n_rows = len(self.cell_C) * CHUNK
        rows = tensor_THX.new_zeros((n_rows, *tensor_THX.shape[1:])).index_copy(0, self.row_T, tensor_THX)
        return rows.unflatten(0, (-1, CHUNK)).transpose(1, 2)

    def joined(self, tensor_CHLX: Tensor) -> Tensor:
        """The tokens of the chunks in their order, (T, H, X)."""
        return tensor_CHLX.transpose(1, 2).flatten(0, 1).index_select(0, self.row_T)


def _zeros_of(query_LHK: Tensor, key_LHK: Tensor, value_LHK: Tensor) -> Tensor:
    """Zeros like the query, with gradients that are zeros instead of missing, whatever the tensors hold."""
    every = torch.ones((), dtype=torch.bool, device=query_LHK.device)
    query_LHK, key_LHK, value_LHK = (tensor.masked_fill(every, 0.0) for tensor in (query_LHK, key_LHK, value_LHK))
    return query_LHK + key_LHK.sum() + value_LHK.sum()


def _features(
    x_HLK: Tensor, weight_MK: Tensor, *, over: tuple[int, ...] = (), stabilizer: Tensor | float | None = None
) -> Tensor:
    """Features of queries or keys; the stabilizer is the maximum over some axes, or given."""
    projected_HLM = x_HLK @ weight_MK.T
    half_norm_HL1 = x_HLK.square().sum(-1, keepdim=True) * (0.5 * x_HLK.shape[-1] ** -0.5)
    if stabilizer is None:
        # A constant in the gradient: except for the floor it cancels between numerator and denominator.
        stabilizer = projected_HLM.detach().amax(over, keepdim=True) if projected_HLM.numel() else 0.0
    n_features = weight_MK.shape[0]
    return (torch.exp(projected_HLM - half_norm_HL1 - stabilizer) + FEATURE_FLOOR) * n_features**-0.5


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fake_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(q), _fake_forward(k), _fake_forward(v)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, projection, floor = inputs
    ctx.save_for_backward(q, k, v, output, cu_seqlens, cu_seqlens_k, projection)
    ctx.floor = floor


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.scfm.linear_attention_backward(grad_out, *ctx.saved_tensors, ctx.floor)
    return *grads, None, None, None, None


if EXTENSION_PATH is not None:
    torch.library.register_fake("scfm::linear_attention_forward", _fake_forward)
    torch.library.register_fake("scfm::linear_attention_backward", _fake_backward)
    torch.library.register_autograd("scfm::linear_attention_forward", _backward, setup_context=_context)
    torch.library.register_autograd("scfm::linear_attention_backward", no_second_derivative)
