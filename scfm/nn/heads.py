"""Heads that predict genes and values from token states."""

# Axes: N chosen tokens, D model width, V tokens of the vocabulary, S value buckets.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scfm.nn.linear import Linear
from scfm.ops.linear import linear


class GeneHead(nn.Module):
    """Predicts the gene of a token: BERT's transform, then the gene embedding as decoder, with one bias per gene."""

    def __init__(self, d_model: int, n_tokens: int, *, norm_eps: float) -> None:
        super().__init__()
        self.transform = Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(n_tokens))

    def forward(self, hidden_ND: Tensor, gene_weight_VD: Tensor) -> Tensor:
        """Return logits over the vocabulary, shape (N, V)."""
        return linear(self.transformed(hidden_ND), gene_weight_VD, self.bias)

    def transformed(self, hidden_ND: Tensor) -> Tensor:
        """Return the input of the decoder, shape (N, D)."""
        return self.norm(F.relu(self.transform(hidden_ND)))


class ValueMLP(nn.Module):
    """Three linear layers with leaky ReLU and one output: scGPT's decoder of values and of zero probabilities."""

    def __init__(self, d_input: int, d_model: int) -> None:
        super().__init__()
        self.linear1 = Linear(d_input, d_model)
        self.linear2 = Linear(d_model, d_model)
        self.linear3 = Linear(d_model, 1)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Return one number per row, shape (N,)."""
        hidden_ND = F.leaky_relu(self.linear1(hidden_ND))
        return self.linear3(F.leaky_relu(self.linear2(hidden_ND))).squeeze(-1)


class ValueHead(nn.Module):
    """Predicts the value of a token from its state (scGPT's GEP decoder); with `zeros` also the logit of "not zero"."""

    def __init__(self, d_input: int, d_model: int, *, zeros: bool) -> None:
        super().__init__()
        self.value = ValueMLP(d_input, d_model)
        self.nonzero = ValueMLP(d_input, d_model) if zeros else None

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Predicted values, shape (N,)."""
        return self.value(hidden_ND)


class LinearValueHead(nn.Module):
    """Predicts the value of a token by one linear layer on its decoder state (scFoundation)."""

    def __init__(self, d_input: int) -> None:
        super().__init__()
        self.value = Linear(d_input, 1)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Predicted values, shape (N,)."""
        return self.value(hidden_ND).squeeze(-1)


class BucketHead(nn.Module):
    """Predicts the bucket of a token by one linear layer on its state (scBERT)."""

    def __init__(self, d_model: int, n_buckets: int) -> None:
        super().__init__()
        self.bucket = Linear(d_model, n_buckets)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Return logits over the buckets, shape (N, S)."""
        return self.bucket(hidden_ND)


class ValueFromCellHead(nn.Module):
    """Predicts the value of a gene from the embedding of its cell (scGPT's MVC decoder): (W sigmoid(A e_gene + a)) . h_cell."""

    def __init__(self, d_model: int, d_input: int, *, zeros: bool) -> None:
        super().__init__()
        self.query = Linear(d_model, d_model)
        self.weight = Linear(d_model, d_input, bias=False)
        self.nonzero = Linear(d_model, d_input) if zeros else None

    def forward(self, cell_ND: Tensor, gene_ND: Tensor) -> Tensor:
        """Return predicted values, shape (N,); row n has the embedding of a gene and the embedding of its cell."""
        return (self.weight(torch.sigmoid(self.query(gene_ND))) * cell_ND).sum(-1)

    def nonzero_logits(self, cell_ND: Tensor, gene_ND: Tensor) -> Tensor:
        """Return logits of "not zero", shape (N,)."""
        assert self.nonzero is not None
        return (self.nonzero(torch.sigmoid(self.query(gene_ND))) * cell_ND).sum(-1)


class BatchLabels(nn.Module):
    """scGPT's embedding of the experimental batch, an input of its decoders in addition to the state."""

    def __init__(self, n_batches: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_batches, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, batch_ids_N: Tensor) -> Tensor:
        return self.norm(self.embedding(batch_ids_N))
