"""Attention on a GPU by torch's own kernels, with all options. The number of launches does not grow with the batch.

Those kernels (:mod:`scfm.ops.engines`) support neither the generative mask nor a bias per key nor the gradient of the
log-sum-exp. If their results were merged under autograd, that gradient would silently be lost. So this file
computes forward and backward explicitly:

- Keys: the kernels get only the context tokens, to which all queries of a cell attend.
- Own key of a target token: the forward merges it by log-sum-exp. The kernels' backward gets the merged output and
  log-sum-exp, so that its probabilities and delta = grad_out . out are correct; then the gradients of the own key are added.
- Bias per key: queries get extra columns of ones, and keys get extra columns whose sum is bias / scale, so that the product
  adds the bias. Each of these columns has few digits, so that no kernel rounds it. The gradient of the bias
  is that of one column.
- Gradient of the log-sum-exp: the output and its gradient get extra columns, so that delta becomes delta - grad_lse.

The scores are never in memory as a whole. When an engine is first used with a dtype and head width on a device, its results for
small batches are compared with plain torch in float64. If they differ, the next engine is used, and finally plain torch, with a
warning.
"""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width, U target tokens, S context tokens, C columns.

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from scfm.ops.engines import COLUMNS, ENGINES, Engine
from scfm.ops.layout import Layout, Sections, lay_out
from scfm.ops.options import OperatorOptions
from scfm.ops.reference import attention as reference

_LOG = logging.getLogger(__name__)
_TRUSTED: dict[tuple[str, torch.device, torch.dtype, int], bool] = {}

N_PIECES = 3  # a float32 number is split into this many pieces of at least 8 binary digits (bfloat16)
# Value of each bias column for a hidden key, and the largest piece of the bias of another key, both before scaling. The score
# of a hidden key must be finite and far below all others. The maximum of float16 is 65,504, so a larger bias than
# 3 x 65,504 x scale is replaced by this limit.
HIDDEN = {torch.float16: 65_504.0}
LARGEST_PIECE = {torch.float16: 65_504.0}
DEFAULT_HIDDEN, DEFAULT_LARGEST_PIECE = 2.0**120, 2.0**110
# A kernel may compute a float32 product as a sum of three tf32 products, which has larger rounding errors.
TOLERANCE = {torch.float32: 64.0}


@dataclass(frozen=True)
class KernelOptions(OperatorOptions):
    """Options of an operator, and the layout of the batch if it is already on the device."""

    packed: Tensor | None = None
    extents: Tensor | None = None


KernelOptions.NAMES = tuple(field.name for field in fields(KernelOptions))
KernelOptions.SCHEMA = OperatorOptions.SCHEMA + ", Tensor? packed, Tensor? extents"


def forward(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> tuple[Tensor, Tensor]:
    """Return output (Tq, H, K) and log-sum-exp (Tq, H), float32, as :func:`scfm.ops.reference.attention.forward`."""
    engine = _engine_for(q, options)
    if engine is None:
        return reference.forward(q, k, v, options, return_lse=True)
    with torch.autocast(q.device.type, enabled=False):
        return _forward(_Problem.of(engine, q, k, v, options))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: KernelOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of `q`, `k`, `v` and `key_bias` (the last of shape (Tk, H), or (0, H) without a bias)."""
    engine = _engine_for(q, options)
    if engine is None:
        return reference.backward(grad_out, grad_lse, q, k, v, options)
    with torch.autocast(q.device.type, enabled=False):
        return _backward(_Problem.of(engine, q, k, v, options), out, lse, grad_out, grad_lse)


@dataclass(frozen=True)
class _Problem:
    """Inputs of one call, and the sections of its layout."""

    engine: Engine
    q: Tensor
    k: Tensor
    v: Tensor
    sections: Sections
    bias: Tensor | None
    scale: float

    @classmethod
    def of(cls, engine: Engine, q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> _Problem:
        if options.packed is None or options.extents is None:
            reference.check_boundaries(q, k, options)
            layout = lay_out(options.cu_seqlens, options.cu_seqlens_k, options.n_known).to(q.device)
        else:
            layout = Layout(options.packed, options.extents)
        return cls(engine, q, k, v, layout.sections(), options.key_bias, options.scale)

    @property
    def width(self) -> int:
        return self.q.shape[2]

    def context(self, tensor: Tensor) -> Tensor:
        """Select the rows of the context keys, to which all queries of a cell attend."""
        return tensor if self.sections.context_S is None else tensor[self.sections.context_S]

    def own_scores(self, target_U: Tensor) -> Tensor:
        """Scores of the target tokens with their own keys, (U, H), float32."""
        scores_UH = (self.q[target_U].float() * self.k[target_U].float()).sum(-1) * self.scale
        return scores_UH if self.bias is None else scores_UH + self.bias[target_U]

    def attending(self, *, with_lse_columns: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, context keys and values with their extra columns, all of the same width."""
        key, value = self.context(self.k), self.context(self.v)
        width = _padded_width(self.width, extra=self.bias is not None or with_lse_columns)
        if self.bias is None:
            return _widened(self.q, width), _widened(key, width), _widened(value, width)
        ones = self.q.new_ones((*self.q.shape[:2], COLUMNS))
        columns = _bias_columns(self.context(self.bias), self.scale, self.q.dtype)
        return (
            _widened(torch.cat([self.q, ones], -1), width),
            _widened(torch.cat([key, columns], -1), width),
            _widened(value, width),
        )

    @property
    def hidden_below(self) -> float:
        """Limit below which a log-sum-exp shows that all keys of the query are hidden."""
        hidden, largest = _magnitudes(self.q.dtype)
        return -abs(self.scale) * (N_PIECES * largest + (COLUMNS - N_PIECES) / 2 * hidden)


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    q, sections = problem.q, problem.sections
    out, lse = _attend_to_context(problem)
    if problem.bias is not None:
        is_blind_TH = lse < problem.hidden_below
        out, lse = out.masked_fill(is_blind_TH[..., None], 0.0), lse.masked_fill(is_blind_TH, -math.inf)
    if sections.keyless_N is not None:
        out, lse = out.index_fill(0, sections.keyless_N, 0.0), lse.index_fill(0, sections.keyless_N, -math.inf)
    target_U = sections.target_U
    if target_U is None:
        return out.contiguous(), lse.contiguous()
    own_UH, alone_UH = problem.own_scores(target_U), lse[target_U]
    own_part_UH = torch.sigmoid(own_UH - alone_UH)  # probability of the own key
    if problem.bias is not None:
        own_part_UH = own_part_UH.masked_fill(own_UH == -math.inf, 0.0)
    merged_UHK = torch.lerp(out[target_U].float(), problem.v[target_U].float(), own_part_UH[..., None])
    return (
        out.contiguous().index_copy_(0, target_U, merged_UHK.to(q.dtype)),
        lse.contiguous().index_copy_(0, target_U, torch.logaddexp(alone_UH, own_UH)),
    )


def _attend_to_context(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the context keys only; undefined for queries without a context."""
    q = problem.q
    query, key, value = problem.attending()
    if not query.shape[0] or not key.shape[0]:
        return q.new_zeros(q.shape), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    parts = [
        problem.engine.forward(*_aligned(query[part.queries], key[part.keys], value[part.keys]), part, problem.scale)
        for part in problem.sections.parts()
    ]
    out, lse = (_joined(results) for results in zip(*parts))
    return out[..., : problem.width], lse


def _backward(
    problem: _Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, sections = problem.q, problem.k, problem.v, problem.sections
    grad_q, *of_keys = _grads_of_context(problem, out, lse, grad_out, grad_lse)
    if sections.keyless_N is not None:
        grad_q = grad_q.index_fill(0, sections.keyless_N, 0.0)
    if sections.context_S is None or sections.target_U is None:
        return grad_q.contiguous(), *(grad.contiguous() for grad in of_keys)  # type: ignore[return-value]
    target_U = sections.target_U
    grad_UHK, query_UHK, key_UHK, value_UHK = (t[target_U].float() for t in (grad_out, q, k, v))
    lse_UH = lse[target_U] if problem.bias is None else _never_minus_inf(lse[target_U])
    prob_UH = torch.exp(problem.own_scores(target_U) - lse_UH)
    moved_UH = (grad_UHK * value_UHK).sum(-1) - (grad_UHK * out[target_U].float()).sum(-1)
    grad_score_UH = prob_UH * (moved_UH if grad_lse is None else moved_UH + grad_lse[target_U])
    grad_dot_UH1 = (grad_score_UH * problem.scale)[..., None]
    grad_q_UHK = grad_q[target_U].float() + grad_dot_UH1 * key_UHK
    # No other query attends to a target key, so its gradients are complete.
    own = (grad_dot_UH1 * query_UHK, prob_UH[..., None] * grad_UHK, grad_score_UH)
    n_biases = 0 if problem.bias is None else k.shape[0]
    rows = (k.shape[0], v.shape[0], n_biases)
    grads = []
    for n_rows, context, target in zip(rows, of_keys, own):
        grad = context.new_empty((n_rows, *context.shape[1:]))
        if n_rows:
            grad.index_copy_(0, sections.context_S, context).index_copy_(0, target_U, target.to(grad.dtype))
        grads.append(grad)
    return grad_q.contiguous().index_copy_(0, target_U, grad_q_UHK.to(q.dtype)), *grads  # type: ignore[return-value]


def _grads_of_context(
    problem: _Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through the context: q (Tq, H, K), k and v (S, H, K), bias (S, H), or (0, H) without a bias."""
    q, width = problem.q, problem.width
    query, key, value = problem.attending(with_lse_columns=grad_lse is not None)
    n_biases = 0 if problem.bias is None else key.shape[0]
    if not query.shape[0] or not key.shape[0]:
        shape = (key.shape[0], q.shape[1], width)
        no_bias = q.new_zeros((n_biases, q.shape[1]), dtype=torch.float32)
        return q.new_zeros(q.shape), q.new_zeros(shape), q.new_zeros(shape), no_bias
    if grad_lse is not None:
        out = torch.cat([out, _lse_columns(grad_lse.masked_fill(lse == -math.inf, 0.0), out.dtype)], -1)
        ones = grad_out.new_zeros((*grad_out.shape[:2], COLUMNS))
        ones[..., :N_PIECES] = 1.0
        grad_out = torch.cat([grad_out, ones], -1)
    out, grad_out = _widened(out, query.shape[2]), _widened(grad_out, query.shape[2])
    every_query_attends = problem.bias is None and problem.sections.keyless_N is None
    above = lse if every_query_attends else _never_minus_inf(lse)
    parts = [
        problem.engine.backward(
            *_aligned(grad_out[p.queries], query[p.queries], key[p.keys], value[p.keys], out[p.queries]),
            above[p.queries], p, problem.scale,
        )
        for p in problem.sections.parts()
    ]  # fmt: skip
    grad_query, grad_key, grad_value = (_joined(grads) for grads in zip(*parts))
    if problem.bias is None:
        grad_bias = q.new_empty((0, q.shape[1]), dtype=torch.float32)
    else:
        grad_bias = grad_key[..., width].float() / problem.scale
    return grad_query[..., :width], grad_key[..., :width], grad_value[..., :width], grad_bias


def _padded_width(width: int, *, extra: bool) -> int:
    return -(-width // COLUMNS) * COLUMNS + (COLUMNS if extra else 0)


def _widened(tensor: Tensor, width: int) -> Tensor:
    """Append columns of zeros up to the given width."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors whose rows or heads are not aligned for loads of 16 bytes, and return the others as they are."""

    def is_aligned(tensor: Tensor) -> bool:
        offsets = (tensor.storage_offset(), tensor.stride(0), tensor.stride(1))
        return tensor.stride(2) == 1 and all(offset * tensor.element_size() % 16 == 0 for offset in offsets)

    return tuple(
        tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors
    )


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _never_minus_inf(lse: Tensor) -> Tensor:
    """Replace -inf (a query that attends to no key) by +inf, so that the probabilities are 0 and not NaN."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def _magnitudes(dtype: torch.dtype) -> tuple[float, float]:
    return HIDDEN.get(dtype, DEFAULT_HIDDEN), LARGEST_PIECE.get(dtype, DEFAULT_LARGEST_PIECE)


def _pieces(values: Tensor, dtype: torch.dtype, largest: float) -> list[Tensor]:
    """Split `values` into float32 pieces that `dtype` represents exactly; for float32, pieces that tf32 represents exactly."""
    few_digits = torch.bfloat16 if dtype == torch.float32 else dtype
    pieces = []
    for _ in range(N_PIECES):
        piece = values.clamp(-largest, largest).to(few_digits).float()
        pieces.append(piece)
        values = values - piece
    return pieces


def _bias_columns(bias_SH: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Extra columns of the keys, (S, H, C), with sum bias / scale. A key hidden by -inf gets a very low score."""
    hidden, largest = _magnitudes(dtype)
    below_SH = (bias_SH == -math.inf) * math.copysign(hidden, -scale)
    columns = [*_pieces(bias_SH.float() / scale, dtype, largest), *[below_SH] * (COLUMNS - N_PIECES)]
    return torch.stack(columns, -1).to(dtype)


def _lse_columns(grad_lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Extra columns of the output, (Tq, H, C), with sum -grad_lse."""
    pieces = torch.stack(_pieces(-grad_lse.float(), dtype, _magnitudes(dtype)[1]), -1).to(dtype)
    return F.pad(pieces, (0, COLUMNS - N_PIECES))


def _engine_for(q: Tensor, options: KernelOptions) -> Engine | None:
    """The fastest engine whose results agree with plain torch; None if there is none."""
    if options.key_bias is not None and options.scale == 0:
        return None  # a column of the keys cannot add a bias then
    return engine_of(q.device, q.dtype, q.shape[2], extra=options.key_bias is not None)


def engine_of(device: torch.device, dtype: torch.dtype, head_dim: int, *, extra: bool = True) -> Engine | None:
    """The fastest engine for a head width that agrees with plain torch; with `extra`, also with the columns of a bias."""
    width = _padded_width(head_dim, extra=extra)
    for engine in ENGINES:
        if dtype in engine.dtypes and width <= engine.max_width and is_trusted(engine, device, dtype, head_dim):
            return engine
    return None


def is_trusted(engine: Engine, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the results of an engine agree with plain torch."""
    key = (engine.name, device, dtype, head_dim)
    if key not in _TRUSTED:
        complaint = _complaint(engine, device, dtype, head_dim)
        _TRUSTED[key] = complaint is None
        if complaint is not None:
            warnings.warn(
                f"torch's {engine.name} attention on {device} in {dtype} at head width {head_dim} {complaint}; scfm does "
                "without it there, which is slower.",
                stacklevel=2,
            )
        _LOG.debug("%s attention on %s in %s at head width %d: %s", *key, complaint or "as plain torch")
    return _TRUSTED[key]


@torch.no_grad()
def _complaint(engine: Engine, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare outputs and gradients of small cells with plain torch; return what is wrong, or None.

    The cases cover packed views, every option, and cells without queries or keys.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(140, 4, 2, head_dim, generator=generator).to(dtype)
    grad_lse, bias = torch.randn(2, 140, 1, generator=generator)
    bias[[1, 75]], bias[:3] = -math.inf, -math.inf  # hides all keys of the first cell, and one key of the last
    cu_seqlens, extra = torch.tensor([0, 3, 70, 70, 140]), _padded_width(head_dim, extra=True) <= engine.max_width
    known, others = torch.tensor([0, 2, 0, 70]), torch.tensor([0, 0, 20, 50, 140])
    cases = [(None, None, None), (None, known, None), (others, None, None)]
    cases += [(None, None, bias), (None, known, bias), (others, None, bias)] if extra else []
    for cu_seqlens_k, n_known, bias_T1 in cases:
        bias_TH = None if bias_T1 is None else bias_T1.expand(-1, 2)
        options = KernelOptions(cu_seqlens, cu_seqlens_k, n_known, bias_TH, head_dim**-0.5)
        q, k, v, grad_out = drawn.double().unbind(1)
        expected = (
            *reference.forward(q, k, v, options, return_lse=True),
            *reference.backward(grad_out, grad_lse.expand(-1, 2) if extra else None, q, k, v, options),
        )
        try:
            found = _results(engine, drawn.to(device), grad_lse.to(device) if extra else None, options)
        except (RuntimeError, NotImplementedError) as error:
            return f"fails ({str(error).splitlines()[0]})"
        allowed = TOLERANCE.get(dtype, 4.0) * torch.finfo(dtype).eps  # correct rounding alone gives half a unit
        if not all(_difference(one, right) <= allowed for one, right in zip(found, expected)):
            return "differs from plain torch on a small batch"
    return None


def _results(
    engine: Engine, drawn: Tensor, grad_lse: Tensor | None, options: KernelOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and gradients of an engine. q, k and v are views of one tensor, as in a network."""
    q, k, v, grad_out = drawn.unbind(1)
    if options.key_bias is not None:
        options = replace(options, key_bias=options.key_bias[:, :1].to(q.device).expand(-1, 2))
    with torch.autocast(q.device.type, enabled=False):
        problem = _Problem.of(engine, q, k, v, options)
        out, lse = _forward(problem)
        grad_lse = None if grad_lse is None else grad_lse.expand(-1, 2)
        return out, lse, *_backward(problem, out, lse, grad_out, grad_lse)


def _difference(found: Tensor, right: Tensor) -> float:
    """Relative norm of the difference. The log-sum-exp -inf of a query without a key is compared as 1,000."""
    found, right = (t.cpu().double().masked_fill(t.cpu() == -math.inf, 1e3) for t in (found, right))
    return float((found - right).norm() / right.norm().clamp(min=1e-30)) if right.numel() else 0.0
