"""From token ids and values to the states that enter the first block."""

# Axes: T packed tokens, D model width.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scfm.nn.linear import Linear

if TYPE_CHECKING:
    from scfm.models.config import ModelConfig

LARGEST_VALUE = 512.0  # scGPT clamps values here before the first linear layer


class ContinuousValueEmbedding(nn.Module):
    """scGPT's value encoder: Linear(1, D), ReLU, Linear(D, D), LayerNorm, dropout.

    Masked (-1) and padding (-2) values go through the same layers, as published.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = Linear(1, config.d_model)
        self.linear2 = Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = config.dropout

    def forward(self, values_T: Tensor) -> Tensor:
        hidden_TD = F.relu(self.linear1(values_T.clamp(max=LARGEST_VALUE)[:, None]))
        return F.dropout(self.norm(self.linear2(hidden_TD)), self.dropout, self.training)


class TokenEmbedding(nn.Module):
    """Sum of the embeddings of gene, rank, token type and value, as far as the family has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gene = nn.Embedding(config.n_tokens, config.d_model, padding_idx=config.pad_id)
        self.gene_norm = nn.LayerNorm(config.d_model) if config.gene_norm else None
        self.rank = nn.Embedding(config.context_length, config.d_model) if config.positions == "rank" else None
        self.token_type = nn.Embedding(config.n_token_types, config.d_model) if config.n_token_types else None
        self.value = ContinuousValueEmbedding(config) if config.values == "continuous" else None
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.embedding_norm else None
        self.dropout = config.dropout if config.embedding_norm else 0.0

    def forward(self, gene_ids_T: Tensor, values_T: Tensor | None, position_T: Tensor) -> Tensor:
        hidden_TD = self.genes(gene_ids_T)
        if self.token_type is not None:
            hidden_TD = hidden_TD + self.token_type.weight[0]
        if self.rank is not None:
            hidden_TD = hidden_TD + self.rank(position_T)
        if self.value is not None:
            if values_T is None:
                raise ValueError("This network embeds values, but the batch has none (`values_T` is None).")
            hidden_TD = hidden_TD + self.value(values_T)
        if self.norm is not None:
            hidden_TD = self.norm(hidden_TD)
        return F.dropout(hidden_TD, self.dropout, self.training)

    def genes(self, gene_ids_T: Tensor) -> Tensor:
        """Embeddings of genes alone, without rank or value, shape (T, D)."""
        hidden_TD = self.gene(gene_ids_T.long())
        return hidden_TD if self.gene_norm is None else self.gene_norm(hidden_TD)


@torch.no_grad()
def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """BERT's initialisation: normal weights of the given deviation, zero biases, zero padding row."""
    if isinstance(module, nn.Linear):
        module.weight.normal_(0.0, std)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(0.0, std)
        if module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
