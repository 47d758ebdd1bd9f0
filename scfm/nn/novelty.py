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


KINDS = ("component", "gene")  # of distance


class ClassGaussians(nn.Module):
    """Two distances of a cell from the nearest class, computed from log1p counts per 10,000.

    The first distance is that of a few principal components, with a covariance that all classes share; it is sensitive to
    programs of many genes. The second is that of all variable genes, with variances that all classes share; it is sensitive
    to single genes that the components do not contain. Both are standardized by the cells of the nearest class, because
    cells of one class can be more alike than cells of another. All parameters are buffers, which optimizers do not change.
    """

    loading_VR: Tensor
    mean_CR: Tensor
    weight_V: Tensor
    mean_CV: Tensor
    component_location_C: Tensor
    component_scale_C: Tensor
    gene_location_C: Tensor
    gene_scale_C: Tensor

    def __init__(self, n_tokens: int, n_classes: int, n_components: int) -> None:
        super().__init__()
        self.register_buffer("loading_VR", torch.zeros(n_tokens, n_components))  # to components with unit covariance
        self.register_buffer("mean_CR", torch.zeros(n_classes, n_components))
        self.register_buffer("weight_V", torch.zeros(n_tokens))  # 1 / variance
        self.register_buffer("mean_CV", torch.zeros(n_classes, n_tokens))
        for kind in KINDS:  # of the logarithms of both distances, for cells that are nearest to each class
            self.register_buffer(f"{kind}_location_C", torch.zeros(n_classes))
            self.register_buffer(f"{kind}_scale_C", torch.ones(n_classes))

    def log_distances(
        self, expression_BV: csr_matrix, shift_V: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the logarithms of both squared distances of each cell, and the class that each is measured from, shapes (B, 2).

        `shift_V` is added to the mean expression of every class, shape (V,).
        """
        loading_VR, mean_CR, weight_V, mean_CV = (
            buffer.cpu().numpy().astype(np.float64)
            for buffer in (self.loading_VR, self.mean_CR, self.weight_V, self.mean_CV)
        )
        if shift_V is not None:
            mean_CR, mean_CV = mean_CR + shift_V @ loading_VR, mean_CV + shift_V
        component_BR = expression_BV @ loading_VR
        near_BC = (component_BR**2).sum(1)[:, None] - 2 * component_BR @ mean_CR.T + (mean_CR**2).sum(1)
        squares_B = expression_BV.multiply(expression_BV) @ weight_V
        products_BC = expression_BV @ (weight_V * mean_CV).T
        gene_BC = squares_B[:, None] - 2 * products_BC + (weight_V * mean_CV**2).sum(1)
        squared_BC2 = np.stack([near_BC, gene_BC], 2)
        return np.log(np.maximum(squared_BC2.min(1), 1e-12)), squared_BC2.argmin(1)

    def standardized(self, log_B2: NDArray[np.float64], class_B2: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the larger of both standardized distances, shape (B,), from the result of `log_distances`."""
        standardized = []
        for kind, log_B, class_B in zip(KINDS, log_B2.T, class_B2.T):
            location_C, scale_C = (getattr(self, f"{kind}_{name}_C").cpu().numpy() for name in ("location", "scale"))
            standardized.append((log_B - location_C[class_B]) / scale_C[class_B])
        return np.maximum(*standardized).astype(np.float32)

    def forward(self, expression_BV: csr_matrix, shift_V: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
        """Novelty of each cell, shape (B,): the larger of both standardized distances; 0 is typical of known cells."""
        return self.standardized(*self.log_distances(expression_BV, shift_V))
