"""Attention on a GPU by torch's own flash kernels, with every option but the key bias, and with right gradients.

Those kernels support neither the generative mask nor the gradient of the log-sum-exp. Merging their results under autograd
would silently drop that gradient (torch's variable-length attention ignores it). So forward and backward are written out:

- Keys: only the context tokens, to which every query of a cell attends.
- The own key of a target token: merged by log-sum-exp in the forward. The flash backward gets the merged output and
  log-sum-exp, from which it computes the right probabilities and the right delta; then the own key's gradients are added.
- A gradient g of the log-sum-exp: dQ += g P K and dK += (g Q)^T P (times the scale), by the same kernels once more.

The scores are never in memory. At the first use of a dtype and head width on a device, a small batch is compared with plain
torch; if torch's kernels or their conventions ever differ from what is assumed here, plain torch is used, with a warning.
"""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width, U target tokens, S context tokens.

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scfm.ops.options import OperatorOptions
from scfm.ops.reference import attention as reference

_LOG = logging.getLogger(__name__)
_TRUSTED: dict[tuple[torch.device, torch.dtype, int], bool] = {}


@dataclass(frozen=True)
class Layout:
    """Which keys the flash kernels are given, and which queries are merged with their own key; tensors on the device."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    context_S: Tensor | None  # token numbers of the context; None if it is all tokens
    target_U: Tensor | None  # token numbers of queries that attend to their own key as well
    keyless_T: Tensor | None  # queries of cells without a context; None if there are none


def layout_of(options: OperatorOptions, device: torch.device) -> Layout:
    n_known = options.n_known
    bounds = options.cu_seqlens.to("cpu", torch.int64)
    bounds_k = bounds if options.cu_seqlens_k is None else options.cu_seqlens_k.to("cpu", torch.int64)
    lengths_B, keys_B = bounds.diff(), bounds_k.diff()
    context_S = target_U = None
    if n_known is not None:
        keys_B = n_known.to("cpu", torch.int64)
        position_T = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(lengths_B)
        is_context_T = position_T < keys_B.repeat_interleave(lengths_B)
        context_S, target_U = is_context_T.nonzero()[:, 0].to(device), (~is_context_T).nonzero()[:, 0].to(device)
    keyless_B = (keys_B == 0) & (lengths_B > 0)
    cu_k = torch.nn.functional.pad(keys_B.cumsum(0), (1, 0))
    return Layout(
        cu_q=bounds.to(device, torch.int32),
        cu_k=cu_k.to(device, torch.int32),
        longest_q=int(lengths_B.max()) if len(lengths_B) else 0,
        longest_k=int(keys_B.max()) if len(keys_B) else 0,
        context_S=context_S,
        target_U=target_U,
        keyless_T=keyless_B.repeat_interleave(lengths_B).to(device) if bool(keyless_B.any()) else None,
    )


@dataclass(frozen=True)
class Problem:
    """One attention problem, and its arguments for the flash kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    scale: float

    def context(self, tensor: Tensor) -> Tensor:
        """Rows of the keys that all queries of a cell attend to."""
        return tensor if self.layout.context_S is None else tensor[self.layout.context_S]

    def scores_of_own_keys(self) -> Tensor:
        """(U, H), float32."""
        target_U = self.layout.target_U
        return (self.q[target_U].float() * self.k[target_U].float()).sum(-1) * self.scale


def flash_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's kernel: output (Tq, H, K) and log-sum-exp (H, Tq), float32; queries without keys are undefined."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, layout.cu_q, layout.cu_k, layout.longest_q, layout.longest_k, 0.0, False, False, scale=scale
    )
    return out, lse


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HT: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's kernel: gradients for probabilities exp(scores - lse) and delta = grad_out . out, whatever those are."""
    unused = torch.empty(0, device=q.device)
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse_HT, layout.cu_q, layout.cu_k, layout.longest_q, layout.longest_k, 0.0, False,
        rng_state, unused, scale=scale,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, options: OperatorOptions) -> tuple[Tensor, Tensor]:
    """Output (Tq, H, K) and log-sum-exp (Tq, H), float32; as :func:`scfm.ops.reference.attention.forward`."""
    if options.key_bias is not None or not is_trusted(q):
        return reference.forward(q, k, v, options, return_lse=True)
    reference.check_boundaries(q, k, options)
    return _forward(Problem(q, k, v, layout_of(options, q.device), options.scale))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: OperatorOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v`, and of `key_bias` ((Tk, H), or (0, H) without one)."""
    if options.key_bias is not None or not is_trusted(q):
        return reference.backward(grad_out, grad_lse, q, k, v, options)
    problem = Problem(q, k, v, layout_of(options, q.device), options.scale)
    grads = _backward(problem, out, lse, grad_out.contiguous(), grad_lse)
    return *grads, q.new_empty((0, q.shape[1]), dtype=torch.float32)


def _attend_to_context(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention over the keys that all queries of a cell attend to, and its log-sum-exp (Tq, H), float32."""
    q, layout = problem.q, problem.layout
    if layout.longest_q == 0 or layout.longest_k == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    out, lse_HT = flash_forward(q, problem.context(problem.k), problem.context(problem.v), layout, problem.scale)
    lse = lse_HT.T
    if layout.keyless_T is not None:
        out = out.masked_fill(layout.keyless_T[:, None, None], 0.0)
        lse = lse.masked_fill(layout.keyless_T[:, None], -math.inf)
    return out, lse


def _forward(problem: Problem) -> tuple[Tensor, Tensor]:
    out, lse = _attend_to_context(problem)
    out, lse = out.contiguous(), lse.contiguous()
    target_U = problem.layout.target_U
    if target_U is None:
        return out, lse
    own_UH = problem.scores_of_own_keys()
    merged_UH = torch.logaddexp(lse[target_U], own_UH)
    weight_UH1 = torch.exp(lse[target_U] - merged_UH)[..., None]
    merged_UHK = (
        out[target_U].float() * weight_UH1 + torch.exp(own_UH - merged_UH)[..., None] * problem.v[target_U].float()
    )
    return (
        out.index_copy(0, target_U, merged_UHK.to(out.dtype)),
        lse.index_copy(0, target_U, merged_UH),
    )


def _backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, target_U = problem.q, problem.k, problem.v, problem.layout.target_U
    grad_q, grad_k, grad_v = _grads_of_context(problem, out, lse, grad_out, grad_lse)
    if target_U is not None:
        grad_UHK, query_UHK, key_UHK, value_UHK = (t[target_U].float() for t in (grad_out, q, k, v))
        prob_UH = torch.exp(problem.scores_of_own_keys() - lse[target_U])
        delta_UH = (grad_UHK * out[target_U].float()).sum(-1)
        if grad_lse is not None:
            delta_UH = delta_UH - grad_lse[target_U]
        grad_score_UH1 = (prob_UH * ((grad_UHK * value_UHK).sum(-1) - delta_UH) * problem.scale)[..., None]
        # No other query attends to a target key: its gradients are complete.
        grad_q = grad_q.index_add(0, target_U, grad_score_UH1 * key_UHK)
        grad_k = grad_k.index_copy(0, target_U, grad_score_UH1 * query_UHK)
        grad_v = grad_v.index_copy(0, target_U, prob_UH[..., None] * grad_UHK)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _grads_of_context(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the keys that all queries of a cell attend to; float32 (Tq or Tk, H, K)."""
    q, layout, scale = problem.q, problem.layout, problem.scale
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (q, problem.k, problem.v))
    if layout.longest_q == 0 or layout.longest_k == 0:
        return grad_q, grad_k, grad_v
    key, value = problem.context(problem.k), problem.context(problem.v)
    lse_HT = lse.masked_fill(lse == -math.inf, math.inf).T.contiguous()
    grad_q_T, grad_k_S, grad_v_S = (
        t.float() for t in flash_backward(grad_out, q, key, value, out, lse_HT, layout, scale)
    )
    if grad_lse is not None:
        # With the keys in place of the values the output is P K, and the gradient of the "values" P^T grad_out.
        weighted = (grad_lse[..., None] * q.float()).to(q.dtype)
        grad_k_S = grad_k_S + flash_backward(weighted, q, key, key, out, lse_HT, layout, scale)[2].float() * scale
        mixed, alone = _attend_to_context(replace(problem, v=problem.k))
        # The part of the merged probabilities that the context has.
        context_part = torch.exp(alone - lse).masked_fill(lse == -math.inf, 0.0)
        grad_q_T = grad_q_T + (grad_lse * context_part)[..., None] * mixed.float() * scale
    if layout.keyless_T is not None:
        grad_q_T = grad_q_T.masked_fill(layout.keyless_T[:, None, None], 0.0)
    if layout.context_S is None:
        return grad_q_T, grad_k_S, grad_v_S
    return grad_q_T, grad_k.index_copy(0, layout.context_S, grad_k_S), grad_v.index_copy(0, layout.context_S, grad_v_S)


def is_trusted(q: Tensor) -> bool:
    """Whether torch's kernels give what plain torch gives, on this device, for this dtype and head width."""
    key = (q.device, q.dtype, q.shape[2])
    if key not in _TRUSTED:
        complaint = _complaint(*key)
        _TRUSTED[key] = complaint is None
        if complaint is not None:
            warnings.warn(
                f"torch's flash attention on {q.device} in {q.dtype} at head width {q.shape[2]} {complaint}; scfm uses its "
                "slower plain-torch attention there.",
                stacklevel=2,
            )
        _LOG.debug("flash attention on %s in %s at head width %d: %s", *key, complaint or "as plain torch")
    return _TRUSTED[key]


@torch.no_grad()
def _complaint(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare outputs and all gradients of small cells: plain, with the generative mask, and one without queries or keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (torch.randn(140, 2, head_dim, generator=generator).to(device, dtype) for _ in range(4))
    grad_lse = torch.randn(140, 2, generator=generator).to(device)
    cu_seqlens, scale = torch.tensor([0, 3, 70, 70, 140]), head_dim**-0.5
    for cu_seqlens_k, n_known in (
        (None, None),
        (None, torch.tensor([0, 2, 0, 70])),
        (torch.tensor([0, 0, 20, 50, 140]), None),
    ):
        options = OperatorOptions(cu_seqlens, cu_seqlens_k, n_known, None, scale)
        problem = Problem(q, k, v, layout_of(options, device), scale)
        try:
            out, lse = _forward(problem)
            grads = _backward(problem, out, lse, grad_out, grad_lse)
        except (RuntimeError, NotImplementedError) as error:
            return f"fails ({str(error).splitlines()[0]})"
        expected_out, expected_lse = reference.forward(q, k, v, options, return_lse=True)
        expected_grads = reference.backward(grad_out, grad_lse, q, k, v, options)[:3]
        for found, right in zip((out, lse, *grads), (expected_out, expected_lse, *expected_grads)):
            # Queries without a key have log-sum-exp -inf in both.
            found, right = (tensor.float().masked_fill(tensor == -math.inf, 1e3) for tensor in (found, right))
            # Roundings alone make up half a unit.
            if not ((found - right).norm() / right.norm()).item() <= 4 * torch.finfo(dtype).eps:
                return "differs from plain torch on a small batch"
    return None
