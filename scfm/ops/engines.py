"""Torch's own attention kernels on a GPU, called through torch's private operators with one common interface.

Both families of kernels take the boundaries of packed cells and support no mask. Their backward uses the given output and
log-sum-exp, even if these were not computed by their forward. Their results for cells without keys are undefined;
:mod:`scfm.ops.torch_kernels` replaces them.
"""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width, B cells of a launch.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm.ops.layout import Part

ATEN: Any = torch.ops.aten
COLUMNS = 8  # head widths must be multiples of this, because the kernels load 16 bytes (4 or 8 numbers) at once
FLASH_MAX_WIDTH = 256
LSE_ROWS = 32  # in the log-sum-exp, the efficient kernels pad the queries of a cell to a multiple of this


@dataclass(frozen=True)
class Engine:
    """One family of attention kernels.

    Attributes
    ----------
    name
        Name that `scfm doctor` shows.
    dtypes
        Supported dtypes.
    max_width
        Largest head width.
    forward
        Function of `(q, k, v, part, scale)` that returns the output (Tq, H, K) and the log-sum-exp (Tq, H), float32.
    backward
        Function of `(grad_out, q, k, v, out, lse, part, scale)` that returns the gradients of `q`, `k` and `v`, computed with
        probabilities exp(scores - lse) and delta = grad_out . out.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    max_width: float
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    out, lse_HT, *_ = ATEN._flash_attention_forward(
        q, k, v, part.cu_q, part.cu_k, part.longest_q, part.longest_k, 0.0, False, False, scale=scale
    )
    return out, lse_HT.T


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(0, device=q.device)
    rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # for dropout, which is not used
    return ATEN._flash_attention_backward(
        grad_out, q, k, v, out, lse.T.contiguous(), part.cu_q, part.cu_k, part.longest_q, part.longest_k, 0.0, False,
        rng_state, unused, scale=scale,
    )  # fmt: skip


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    out, lse_BHL, *_ = ATEN._efficient_attention_forward(
        q[None], k[None], v[None], None, part.cu_q, part.cu_k, part.longest_q, part.longest_k, 0.0, 0, True, scale=scale
    )
    return out[0], lse_BHL[part.cell_T, :, part.position_T]


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows = -(-part.longest_q // LSE_ROWS) * LSE_ROWS
    # Padding rows get log-sum-exp +inf, so their probabilities are exp(scores - inf) = 0.
    lse_BHL = lse.new_full((part.n_cells, lse.shape[1], n_rows), math.inf)
    lse_BHL[part.cell_T, :, part.position_T] = lse
    dropout_state = torch.zeros((), dtype=torch.int64)
    # If the keys were split over several blocks, the gradients of queries would be summed in no fixed order.
    splits = 1 if torch.are_deterministic_algorithms_enabled() else None
    grads = ATEN._efficient_attention_backward(
        grad_out[None], q[None], k[None], v[None], None, out[None], part.cu_q, part.cu_k, part.longest_q, part.longest_k,
        lse_BHL, 0.0, dropout_state, dropout_state, 0, False, scale=scale, num_splits_key=splits,
    )  # fmt: skip
    return grads[0][0], grads[1][0], grads[2][0]


FLASH = Engine("flash", (torch.bfloat16, torch.float16), FLASH_MAX_WIDTH, _flash_forward, _flash_backward)
EFFICIENT = Engine(
    "efficient", (torch.float32, torch.bfloat16, torch.float16), math.inf, _efficient_forward, _efficient_backward
)
ENGINES = (FLASH, EFFICIENT)  # the fastest first
