"""Heads that classify cells or genes: scfm's, and those of published models."""

# Axes: B cells, N rows, V tokens of the vocabulary, T packed tokens, P positions of a fixed panel, D model width, C classes.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from scfm.nn.config import ClassHeadConfig
from scfm.nn.linear import Linear
from scfm.ops.linear import linear

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MAX_SCALED = 10.0  # scaled value at which the gene classifier clips a gene


class ClassHead(nn.Module):
    """scfm's head for the class of a cell: batch norm of the embedding without scale and shift, dropout, one linear layer.

    Embeddings that are means over many tokens have a large common part and differ little between cells. Without the batch
    norm, a small training step changes the common part, and with it the logits of all cells.
    """

    def __init__(self, d_input: int, config: ClassHeadConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.BatchNorm1d(d_input, affine=False)
        self.linear = Linear(d_input, config.n_classes)

    def forward(self, cell_BD: Tensor) -> Tensor:
        """Return logits, shape (B, C). In evaluation they are independent of the rest of the batch."""
        return self.linear(F.dropout(self._normalized(cell_BD), self.dropout, self.training))

    def _normalized(self, cell_BD: Tensor) -> Tensor:
        assert self.norm.running_mean is not None
        cell_BD = cell_BD.to(self.norm.running_mean.dtype)  # a mean over tokens is float32, also of a bfloat16 network
        if cell_BD.shape[0] > 1:
            return self.norm(cell_BD)
        # The last batch of an epoch may hold one cell, which has no variance.
        return F.batch_norm(cell_BD, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)

    @torch.no_grad()
    def set_statistics(self, cell_BD: Tensor) -> None:
        """Compute mean and variance for evaluation from all training cells, shape (B, D)."""
        mean_D, variance_D = self.norm.running_mean, self.norm.running_var
        assert mean_D is not None
        assert variance_D is not None
        mean_D.copy_(cell_BD.mean(0))
        variance_D.copy_(cell_BD.var(0, correction=0))

    @torch.no_grad()
    def set_linear_probe(self, weight_CD: Tensor, bias_C: Tensor) -> None:
        """Initialize with a linear classifier that was fitted on the normalized embeddings of a frozen network."""
        self.linear.weight.copy_(weight_CD)
        self.linear.bias.copy_(bias_C)


class LinearClassifier(Protocol):
    """A classifier of scaled expression that is linear in every gene: weights (V, C) and biases (C,)."""

    @property
    def weight_VC(self) -> NDArray[np.float64]: ...

    @property
    def bias_C(self) -> NDArray[np.float64]: ...


class GeneClassifier(nn.Module):
    """The linear members of the ensemble: one linear classifier of scaled log1p counts per 10,000.

    The expression of each gene is multiplied by its scale, and values above `MAX_SCALED` are set to it, so that no gene
    decides alone. The weighted sum of several linear classifiers is linear too, so only the sum is stored. The weights are
    buffers: they are fitted by logistic regression, and optimizers do not change them.
    """

    scale_V: Tensor
    weight_VC: Tensor
    bias_C: Tensor
    ensemble_weights: Tensor

    def __init__(self, n_tokens: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("scale_V", torch.ones(n_tokens))
        self.register_buffer("weight_VC", torch.zeros(n_tokens, n_classes))
        self.register_buffer("bias_C", torch.zeros(n_classes))
        self.register_buffer("ensemble_weights", torch.ones(2))  # of the network, of this classifier

    @torch.no_grad()
    def set_members(self, members: Sequence[LinearClassifier], weights: NDArray[np.float64]) -> None:
        """Keep the weighted sum of linear classifiers; the first of `weights`, shape (1 + members,), is the network's."""
        weight_VC = sum(weight * member.weight_VC for weight, member in zip(weights[1:], members))
        bias_C = sum(weight * member.bias_C for weight, member in zip(weights[1:], members))
        self.weight_VC.copy_(torch.from_numpy(weight_VC / weights[1:].sum()))
        self.bias_C.copy_(torch.from_numpy(bias_C / weights[1:].sum()))
        self.ensemble_weights.copy_(torch.tensor([weights[0], weights[1:].sum()]))

    def scaled(self, expression_BV: csr_matrix) -> csr_matrix:
        """Scale and clip log1p counts per 10,000 by token id, shape (B, V)."""
        scaled_BV = expression_BV.astype(np.float32, copy=True)
        scaled_BV.data *= self.scale_V.cpu().numpy()[scaled_BV.indices]
        np.minimum(scaled_BV.data, MAX_SCALED, out=scaled_BV.data)
        return scaled_BV

    def logits(self, expression_BV: csr_matrix) -> NDArray[np.float32]:
        """Return logits, shape (B, C), from log1p counts per 10,000 by token id, shape (B, V)."""
        return self.scaled(expression_BV) @ self.weight_VC.cpu().numpy() + self.bias_C.cpu().numpy()

    def change(self, shift_V: NDArray[np.float64]) -> NDArray[np.float64]:
        """Change of the logits of a cell if `shift_V`, shape (V,), is added to its expression, without clipping; shape (C,)."""
        return (shift_V * self.scale_V.cpu().numpy()) @ self.weight_VC.cpu().numpy()

    def joined_with(self, network_logits_BC: Tensor, expression_BV: csr_matrix) -> Tensor:
        """Return logits of the ensemble, the weighted sum of the log-probabilities of its members, shape (B, C)."""
        members = (network_logits_BC, torch.from_numpy(self.logits(expression_BV)))
        weights = self.ensemble_weights.tolist()
        return sum(w * F.log_softmax(logits_BC, -1) for w, logits_BC in zip(weights, members))


class PoolerClassHead(nn.Module):
    """BERT's head for a cell: linear layer and tanh on the state of the first token, dropout, one linear layer (Geneformer)."""

    def __init__(self, d_model: int, config: ClassHeadConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.pooler = Linear(d_model, d_model)
        self.linear = Linear(d_model, config.n_classes)

    def forward(self, cell_BD: Tensor) -> Tensor:
        """Return logits from the states of the first tokens, shape (B, C)."""
        return self.linear(F.dropout(torch.tanh(self.pooler(cell_BD)), self.dropout, self.training))


class TokenClassHead(nn.Module):
    """BERT's head for a token: dropout, one linear layer (Geneformer's gene classifier)."""

    def __init__(self, d_model: int, config: ClassHeadConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.linear = Linear(d_model, config.n_classes)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits of each token, shape (N, C)."""
        return self.linear(F.dropout(hidden_ND, self.dropout, self.training))


class MLPClassHead(nn.Module):
    """scGPT's head for a cell: `n_layers - 1` times (linear, activation, layer norm), then a linear layer.

    With leaky ReLU and experimental batches as classes it is the discriminator for gradient reversal.
    """

    def __init__(self, d_model: int, n_classes: int, n_layers: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(n_layers - 1):
            layers += [Linear(d_model, d_model), activation(), nn.LayerNorm(d_model)]
        self.layers = nn.Sequential(*layers)
        self.linear = Linear(d_model, n_classes)

    def forward(self, cell_BD: Tensor) -> Tensor:
        """Return logits, shape (B, C)."""
        return self.linear(self.layers(cell_BD))


class PanelClassHead(nn.Module):
    """scBERT's head for a cell: a 1 x D convolution of each position's state, then three linear layers with ReLU and dropout.

    Every cell has the same number of positions. The widths 512 and 128 are those of the published code.
    """

    def __init__(self, d_model: int, n_positions: int, config: ClassHeadConfig) -> None:
        super().__init__()
        self.n_positions, self.dropout = n_positions, config.dropout
        self.convolution = nn.Conv2d(1, 1, (1, d_model))
        self.linear1 = Linear(n_positions, 512)
        self.linear2 = Linear(512, 128)
        self.linear3 = Linear(128, config.n_classes)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Return logits from all token states, shape (B, C)."""
        weight_1D, bias_1 = self.convolution.weight.view(1, -1), self.convolution.bias
        panel_BP = F.relu(linear(hidden_TD, weight_1D, bias_1)).view(-1, self.n_positions)
        hidden_BD = F.dropout(F.relu(self.linear1(panel_BP)), self.dropout, self.training)
        return self.linear3(F.dropout(F.relu(self.linear2(hidden_BD)), self.dropout, self.training))


def make_class_head(config: ClassHeadConfig, *, d_model: int, d_embedding: int, context_length: int) -> nn.Module:
    """Build a head of kind `config.kind` for `config.n_classes` classes."""
    match config.kind:
        case "mlp":
            return MLPClassHead(d_model, config.n_classes, config.n_layers)
        case "panel":
            return PanelClassHead(d_model, context_length, config)
        case "pooler":
            return PoolerClassHead(d_model, config)
        case "token":
            return TokenClassHead(d_model, config)
        case _:
            return ClassHead(d_embedding, config)
