"""Torch's own attention kernels on a GPU, called by their private operators and brought to one form.

Both take cells by boundaries and know no mask. Their backward takes the given output and log-sum-exp as they are, whatever they
come from. What each of them leaves undefined for cells without keys is defined by :mod:`scfm.ops.torch_kernels`.
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
COLUMNS = 8  # head widths are multiples of this: 16 bytes, which the kernels load at once, are 4 or 8 numbers
FLASH_MAX_WIDTH = 256
LSE_ROWS = 32  # the efficient kernels pad the queries of a cell to a multiple of this in their log-sum-exp


@dataclass(frozen=True)
class Engine:
    """One family of kernels.

    Attributes
    ----------
    name
        As `scfm doctor` shows it.
    dtypes
        Types it computes in.
    max_width
        Largest head width.
    forward
        `(q, k, v, part, scale)` to output (Tq, H, K) and log-sum-exp (Tq, H), float32.
    backward
        `(grad_out, q, k, v, out, lse, part, scale)` to gradients, for probabilities exp(scores - lse) and
        delta = grad_out . out.
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
    rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
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
    # The probabilities of rows that are no queries are exp(scores - inf) = 0.
    lse_BHL = lse.new_full((part.n_cells, lse.shape[1], n_rows), math.inf)
    lse_BHL[part.cell_T, :, part.position_T] = lse
    dropout_state = torch.zeros((), dtype=torch.int64)
    # With the keys split over several blocks, the gradients of queries are added in any order.
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
ENGINES = (FLASH, EFFICIENT)  # the faster ones first
