"""What is read off the states: genes, values, classes."""

# Axes: B cells, T packed tokens, N chosen tokens, D model width, V tokens of the vocabulary, C classes.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scfm.nn.linear import Linear

if TYPE_CHECKING:
    from scfm.models.config import ModelConfig


class GeneHead(nn.Module):
    """Which gene a token is: BERT's transform, then the gene embedding as decoder, and a bias a gene."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.n_tokens))

    def forward(self, hidden_ND: Tensor, gene_weight_VD: Tensor) -> Tensor:
        """Logits over the vocabulary, shape (N, V)."""
        return F.linear(self.norm(F.relu(self.transform(hidden_ND))), gene_weight_VD, self.bias)


class ValueHead(nn.Module):
    """Value of a token from its state (scGPT's GEP decoder): three linear layers with leaky ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = Linear(config.d_model, config.d_model)
        self.linear2 = Linear(config.d_model, config.d_model)
        self.linear3 = Linear(config.d_model, 1)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Predicted values, shape (N,)."""
        hidden_ND = F.leaky_relu(self.linear1(hidden_ND))
        return self.linear3(F.leaky_relu(self.linear2(hidden_ND))).squeeze(-1)


class ValueFromCellHead(nn.Module):
    """Value of a gene from its cell's embedding (scGPT's MVC decoder): (W sigmoid(A e_gene + a)) . h_cell."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = Linear(config.d_model, config.d_model)
        self.weight = Linear(config.d_model, config.d_model, bias=False)

    def forward(self, cell_ND: Tensor, gene_ND: Tensor) -> Tensor:
        """Predicted values, shape (N,); row n pairs a gene's embedding with the embedding of its cell."""
        return (self.weight(torch.sigmoid(self.query(gene_ND))) * cell_ND).sum(-1)


class ClassHead(nn.Module):
    """Class of a cell from its embedding: batch norm without a gain, dropout, one linear layer.

    The mean of many token states varies little from cell to cell beside what all cells share. Without the norm a
    small step of the network moves that shared part, and with it every logit.
    """

    def __init__(self, config: ModelConfig, n_classes: int) -> None:
        super().__init__()
        self.dropout = config.class_dropout
        self.norm = nn.BatchNorm1d(config.d_model, affine=False)
        self.linear = Linear(config.d_model, n_classes)

    def forward(self, cell_BD: Tensor) -> Tensor:
        """Logits, shape (B, C). In evaluation a cell's logits do not depend on the batch."""
        return self.linear(F.dropout(self.norm(cell_BD), self.dropout, self.training))

    @torch.no_grad()
    def set_statistics(self, cell_BD: Tensor) -> None:
        """Take mean and variance for evaluation from all training cells, shape (B, D)."""
        mean_D, variance_D = self.norm.running_mean, self.norm.running_var
        assert mean_D is not None
        assert variance_D is not None
        mean_D.copy_(cell_BD.mean(0))
        variance_D.copy_(cell_BD.var(0, correction=0))

    @torch.no_grad()
    def set_linear_probe(self, weight_CD: Tensor, bias_C: Tensor) -> None:
        """Start from a linear classifier fitted on the normalised embeddings of a frozen network."""
        self.linear.weight.copy_(weight_CD)
        self.linear.bias.copy_(bias_C)
