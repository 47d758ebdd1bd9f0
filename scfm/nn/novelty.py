"""Novelty of a cell: its distance from Gaussians of the known classes."""

# Axes: B cells, V tokens of the vocabulary, R components, C classes.

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class ClassGaussians(nn.Module):
    """Two distances of a cell from the nearest class, computed from log1p counts per 10,000.

    The first distance is that of a few principal components, with a covariance that all classes share; it is sensitive to
    programs of many genes. The second is that of all variable genes, with variances that all classes share; it is sensitive
    to single genes that the components do not contain. All parameters are buffers, which optimizers do not change.
    """

    loading_VR: Tensor
    mean_CR: Tensor
    weight_V: Tensor
    mean_CV: Tensor
    location: Tensor
    scale: Tensor

    def __init__(self, n_tokens: int, n_classes: int, n_components: int) -> None:
        super().__init__()
        self.register_buffer("loading_VR", torch.zeros(n_tokens, n_components))  # to components with unit covariance
        self.register_buffer("mean_CR", torch.zeros(n_classes, n_components))
        self.register_buffer("weight_V", torch.zeros(n_tokens))  # 1 / variance
        self.register_buffer("mean_CV", torch.zeros(n_classes, n_tokens))
        self.register_buffer("location", torch.zeros(2))  # of the logarithms of both distances
        self.register_buffer("scale", torch.ones(2))

    def log_distances(self, expression_BV: csr_matrix) -> NDArray[np.float64]:
        """Return the logarithms of both squared distances of each cell, shape (B, 2)."""
        loading_VR, mean_CR, weight_V, mean_CV = (
            buffer.cpu().numpy().astype(np.float64)
            for buffer in (self.loading_VR, self.mean_CR, self.weight_V, self.mean_CV)
        )
        component_BR = expression_BV @ loading_VR
        near_B = ((component_BR[:, None] - mean_CR) ** 2).sum(2).min(1)
        squares_B = expression_BV.multiply(expression_BV) @ weight_V
        products_BC = expression_BV @ (weight_V * mean_CV).T
        gene_BC = squares_B[:, None] - 2 * products_BC + (weight_V * mean_CV**2).sum(1)
        return np.log(np.maximum(np.stack([near_B, gene_BC.min(1)], 1), 1e-12))

    def forward(self, expression_BV: csr_matrix) -> NDArray[np.float32]:
        """Novelty of each cell, shape (B,): the larger of both standardized distances; 0 is typical of known cells."""
        z_B2 = (self.log_distances(expression_BV) - self.location.cpu().numpy()) / self.scale.cpu().numpy()
        return z_B2.max(1).astype(np.float32)
