"""Starting points: gene embeddings from a singular value decomposition, a class head from a linear probe."""

# Axes: B cells, V tokens of the vocabulary, D model width, R components, C classes.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from scfm.models.network import CellTransformer

PROBE_INVERSE_PENALTY = 0.1  # scikit-learn's C


def gene_loadings(expression_BV: sparse.csr_matrix, n_components: int, seed: int = 0) -> torch.Tensor:
    """Right singular vectors of the cells-by-genes matrix, shape (V, R), float32, each column of root mean square 1.

    Large loadings are drawn in (the signed square root is taken), so that a few marker genes do not use up the scale.
    """
    n_components = min(n_components, *(size - 1 for size in expression_BV.shape))
    svd = TruncatedSVD(n_components, random_state=seed).fit(expression_BV)
    loadings_VR = svd.components_.T
    scaled_VR = loadings_VR / np.sqrt((loadings_VR**2).mean(0, keepdims=True) + 1e-12)
    return torch.from_numpy(np.sign(scaled_VR) * np.sqrt(np.abs(scaled_VR))).float()


@torch.no_grad()
def set_gene_embeddings(network: CellTransformer, loadings_VR: torch.Tensor, scale: float) -> None:
    """Put the loadings into the first columns of the gene embedding, times `scale`; the rest keeps its random start."""
    weight_VD = network.embedding.gene.weight
    n_columns = min(loadings_VR.shape[1], weight_VD.shape[1])
    is_gene_V = network.is_gene_V
    weight_VD[is_gene_V, :n_columns] = scale * loadings_VR[is_gene_V, :n_columns].to(weight_VD.device)


def set_linear_probe(network: CellTransformer, embedding_BD: NDArray[np.float32], labels_B: NDArray[np.int64]) -> None:
    """Fit a balanced logistic regression on frozen embeddings and put it into the class head.

    Fine-tuning from a probe keeps what pretraining learned, where a random head would first overwrite it (LP-FT, Kumar et al. 2022,
    arXiv:2202.10054). Every class of the head must occur in `labels_B`.

    Parameters
    ----------
    network
        With a class head.
    embedding_BD
        Embeddings of the training cells by this network, shape (B, D), float32.
    labels_B
        Their classes, shape (B,), int64.
    """
    head = network.class_head
    assert head is not None
    head.set_statistics(torch.from_numpy(embedding_BD))
    normalized_BD = StandardScaler().fit_transform(embedding_BD.astype(np.float64))
    probe = LogisticRegression(C=PROBE_INVERSE_PENALTY, class_weight="balanced", max_iter=2000)
    probe.fit(normalized_BD, labels_B)
    weight_CD, bias_C = probe.coef_, probe.intercept_
    if len(probe.classes_) == 2:  # scikit-learn keeps one row for two classes; a softmax needs one each
        weight_CD, bias_C = np.vstack([-weight_CD, weight_CD]) / 2, np.concatenate([-bias_C, bias_C]) / 2
    head.set_linear_probe(torch.from_numpy(weight_CD), torch.from_numpy(bias_C))
