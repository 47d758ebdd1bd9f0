"""Embeddings of the values of tokens, one module per kind."""

# Axes: T packed tokens, D model width, S soft bins.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scfm.nn.config import EmbeddingConfig
from scfm.nn.dropout import dropout
from scfm.nn.linear import Linear

MAX_VALUE = 512.0  # scGPT clips values here before the first linear layer
MASK_VALUE = -1.0  # replaces a masked value in every encoding except bucket, which has a bucket for it


class ContinuousValueEmbedding(nn.Module):
    """scGPT's value encoder: Linear(1, D), ReLU, Linear(D, D), LayerNorm, dropout.

    Masked (-1) and padding (-2) values go through the same layers, as published.
    """

    def __init__(self, d_model: int, config: EmbeddingConfig, *, dropout: float) -> None:
        super().__init__()
        self.linear1 = Linear(1, d_model)
        self.linear2 = Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = dropout

    def forward(self, values_T: Tensor) -> Tensor:
        hidden_TD = F.relu(self.linear1(values_T.clamp(max=MAX_VALUE)[:, None]))
        return dropout(self.norm(self.linear2(hidden_TD)), self.dropout, self.training)


class BucketValueEmbedding(nn.Embedding):
    """One vector per bucket (scBERT); the last bucket is for masked values."""

    def __init__(self, d_model: int, config: EmbeddingConfig, *, dropout: float) -> None:
        super().__init__(config.n_value_bins, d_model)

    def forward(self, values_T: Tensor) -> Tensor:
        return super().forward(values_T.long())


class SoftBinValueEmbedding(nn.Module):
    """scFoundation's soft binning: the embedding of a value is a learned mixture of `n_value_bins` vectors.

    h = LeakyReLU_0.1(W1 v + b1), g = softmax(alpha h + W2 h + b2), embedding = g^T E. The mask value (-1) has a separate
    vector. `pad` exists only because published checkpoints contain it; scfm has no padding.
    """

    def __init__(self, d_model: int, config: EmbeddingConfig, *, dropout: float) -> None:
        super().__init__()
        self.linear1 = Linear(1, config.n_value_bins)
        self.linear2 = Linear(config.n_value_bins, config.n_value_bins)
        self.bins = nn.Embedding(config.n_value_bins, d_model)
        self.mask = nn.Embedding(1, d_model)
        self.pad = nn.Embedding(1, d_model)
        self.pad.weight.requires_grad_(False)
        self.alpha = config.bin_alpha

    def forward(self, values_T: Tensor) -> Tensor:
        hidden_TS = F.leaky_relu(self.linear1(values_T[:, None]), 0.1)
        mixture_TS = torch.softmax(self.alpha * hidden_TS + self.linear2(hidden_TS), -1)
        embedded_TD = F.linear(mixture_TS, self.bins.weight.T)
        return torch.where((values_T == MASK_VALUE)[:, None], self.mask.weight, embedded_TD)


VALUE_EMBEDDINGS = {
    "continuous": ContinuousValueEmbedding,
    "bucket": BucketValueEmbedding,
    "soft_bins": SoftBinValueEmbedding,
}
