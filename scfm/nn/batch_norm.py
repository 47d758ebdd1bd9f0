"""Batch norm of token embeddings, shared by all cells or separate for each experimental batch."""

# Axes: T packed tokens, D model width.

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 6.1e-5  # scGPT's


class TokenBatchNorm(nn.Module):
    """scGPT's batch norm of the summed embedding: one with scale and shift, or one without them for each of `n_domains`.

    The published code includes padding in the statistics, and needs all cells of a training batch to be of one domain. Here
    the statistics contain no padding, and a training batch may mix domains, each normalized with its own tokens.
    """

    def __init__(self, d_model: int, *, n_domains: int | None) -> None:
        super().__init__()
        shared = n_domains is None
        self.norms = nn.ModuleList(nn.BatchNorm1d(d_model, eps=EPS, affine=shared) for _ in range(n_domains or 1))

    def forward(self, hidden_TD: Tensor, batch_ids_T: Tensor | None) -> Tensor:
        if len(self.norms) == 1:
            return self.norms[0](hidden_TD)
        if batch_ids_T is None:
            raise ValueError("This network has a batch norm for each experimental batch. Pass `batch_ids_B`.")
        output_TD = torch.empty_like(hidden_TD)
        for domain, norm in enumerate(self.norms):
            rows = (batch_ids_T == domain).nonzero().squeeze(1)
            if rows.numel():
                output_TD = output_TD.index_copy(0, rows, norm(hidden_TD.index_select(0, rows)))
        return output_TD
