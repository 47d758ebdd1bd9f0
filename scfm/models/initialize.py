"""Initialize the gene embedding of a network with a singular value decomposition of expression."""

# Axes: B cells, V tokens of the vocabulary, D model width, R components.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm.errors import CountsError
from scfm.models.network import CellTransformer

N_COMPONENTS = 50
GENE_SCALE = 0.3  # root mean square of the loadings in the gene embedding
MAX_CELLS_FOR_SVD = 20_000


def start_from_loadings(
    network: CellTransformer, loadings_VR: NDArray[np.floating], totals_V: NDArray[np.floating], *, seed: int = 0
) -> None:
    """Initialize the gene embedding of a network with loadings (V, R) of log-expression; it needs neither totals nor a seed."""
    set_gene_embeddings(network, compressed_loadings(loadings_VR), scale=GENE_SCALE)


def gene_loadings(expression_BV: sparse.csr_matrix, n_components: int, seed: int = 0) -> torch.Tensor:
    """Return right singular vectors of the cells-by-genes matrix, scaled by `compressed_loadings`, shape (V, R), float32."""
    return compressed_loadings(singular_vectors(expression_BV, n_components, seed))


def singular_vectors(expression_BV: sparse.csr_matrix, n_components: int, seed: int = 0) -> NDArray[np.floating]:
    """Return right singular vectors of the cells-by-genes matrix, shape (V, R)."""
    n_components = min(n_components, *(size - 1 for size in expression_BV.shape))
    if n_components < 1:
        raise CountsError(
            f"Gene embeddings start from principal components, which need two cells, and there is {expression_BV.shape[0]}. "
            "Pass more cells, or a pretrained model (`model=`)."
        )
    from sklearn.decomposition import TruncatedSVD  # takes a second, which loading a model should not

    return TruncatedSVD(n_components, random_state=seed).fit(expression_BV).components_.T


def compressed_loadings(loadings_VR: NDArray[np.floating]) -> torch.Tensor:
    """Return the signed square root of loadings with columns scaled to a root mean square of 1, shape (V, R), float32.

    Without the square root, a few marker genes with large loadings would dominate the scale.
    """
    scaled_VR = loadings_VR / np.sqrt((loadings_VR**2).mean(0, keepdims=True) + 1e-12)
    return torch.from_numpy(np.sign(scaled_VR) * np.sqrt(np.abs(scaled_VR))).float()


@torch.no_grad()
def set_gene_embeddings(network: CellTransformer, loadings_VR: torch.Tensor, scale: float) -> None:
    """Write the loadings, times `scale`, into the first columns of the gene embedding; the rest stays random."""
    weight_VD = network.embedding.gene.weight
    n_columns = min(loadings_VR.shape[1], weight_VD.shape[1])
    is_gene_V = network.is_gene_V
    weight_VD[is_gene_V, :n_columns] = scale * loadings_VR[is_gene_V, :n_columns].to(weight_VD)


def sample_rows(rows: NDArray[np.int64], seed: int, keep: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return at most `MAX_CELLS_FOR_SVD` of the rows, drawn at random, and all of `keep`; ascending."""
    if len(rows) > MAX_CELLS_FOR_SVD:
        rows = np.random.default_rng(seed).choice(rows, MAX_CELLS_FOR_SVD, replace=False)
    return np.sort(rows) if keep is None else np.union1d(rows, keep)
