"""`cross_entropy_gradient`: loss and gradient of rows of logits in one pass over memory."""

# Axes: N rows, V classes.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scfm.ops.backend import EXTENSION_PATH, FUSED_DTYPES


def cross_entropy_gradient(logits_NV: Tensor, bias_V: Tensor | None, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of `logits + bias` in each row, and replace the logits by its gradient.

    Parameters
    ----------
    logits_NV
        Shape (N, V), with a contiguous last axis; overwritten by softmax(logits + bias) minus one-hot(target), in its dtype.
    bias_V
        Added to each row, shape (V,), float32; nothing if None.
    target_N
        Class of each row, shape (N,), int64.

    Returns
    -------
    Loss of each row, shape (N,), and gradient of the bias for the sum of the losses, shape (V,), both float32. Sums are in
    float32. In the compiled kernel their order is independent of the number of threads.

    Raises
    ------
    RuntimeError
        If a target is not a class, or shapes or dtypes do not fit.
    """
    if EXTENSION_PATH is not None and logits_NV.device.type == "cpu" and logits_NV.dtype in FUSED_DTYPES:
        return torch.ops.scfm.cross_entropy_gradient(logits_NV, bias_V, target_N)
    scores_NV = logits_NV.float() if bias_V is None else logits_NV + bias_V
    log_NV = torch.log_softmax(scores_NV, 1, dtype=torch.float32)
    target_N1 = target_N[:, None]
    loss_N = -log_NV.gather(1, target_N1).squeeze(1)
    grad_NV = log_NV.exp_().scatter_add_(1, target_N1, torch.full_like(target_N1, -1, dtype=torch.float32))
    logits_NV.copy_(grad_NV)
    return loss_N, grad_NV.sum(0)


def _fake_cross_entropy_gradient(logits_NV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n_rows, n_classes = logits_NV.shape
    return logits_NV.new_empty(n_rows, dtype=torch.float32), logits_NV.new_empty(n_classes, dtype=torch.float32)


if EXTENSION_PATH is not None:
    torch.library.register_fake("scfm::cross_entropy_gradient", _fake_cross_entropy_gradient)
