"""Add genes to the vocabulary of a trained model."""

# Axes: B cells, V tokens of the new vocabulary, G genes in both, R components, D model width.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from scfm.encoding import Encoding
from scfm.errors import ModelTaskError
from scfm.models.initialize import gene_loadings
from scfm.models.network import CellTransformer
from scfm.vocab import Vocabulary

N_COMPONENTS = 50
RIDGE_PENALTY = 10.0


def extended_vocabulary(vocabulary: Vocabulary, genes: Sequence[str]) -> Vocabulary:
    """Return a vocabulary with further genes at its end; existing tokens keep their ids."""
    return Vocabulary(
        [*vocabulary.tokens, *genes],
        special=dict(vocabulary.special),
        aliases=dict(vocabulary.aliases),
        id_type=vocabulary.id_type,
    )


def extended_encoding(encoding: Encoding, vocabulary: Vocabulary, learned: Encoding) -> Encoding:
    """Return the encoding for a longer vocabulary.

    Parameters
    ----------
    encoding
        The encoding of the model; its medians are kept.
    vocabulary
        Result of `extended_vocabulary`.
    learned
        An encoding with the same settings, learned from the new data with the longer vocabulary. Only the medians of the new
        genes are used, multiplied by the typical ratio of the model's medians to the learned ones over the common genes.

    Raises
    ------
    ModelTaskError
        If the encoding needs a fixed set of genes.
    """
    if encoding.config.include_zeros:
        raise ModelTaskError(
            "The vocabulary of this model is a fixed set of genes, which cannot be extended. "
            "Omit `extend_vocabulary`; other genes are then ignored."
        )
    if encoding.medians is None:
        return type(encoding)(encoding.config, vocabulary)
    assert learned.medians is not None
    medians_V = learned.medians.copy()
    n_old = len(encoding.vocabulary)
    with np.errstate(invalid="ignore"):
        ratio = np.nanmedian(encoding.medians / medians_V[:n_old])
    medians_V *= ratio if np.isfinite(ratio) else 1.0
    medians_V[:n_old] = encoding.medians
    return type(encoding)(encoding.config, vocabulary, medians=medians_V)


def extend_network(
    network: CellTransformer, vocabulary: Vocabulary, expression_BV: sparse.csr_matrix, *, seed: int = 0
) -> CellTransformer:
    """Return a copy of the network for a longer vocabulary.

    The embedding of a new gene is predicted from its loadings on principal components of the new data, by a ridge
    regression that is fitted on the genes of the old vocabulary.

    Parameters
    ----------
    network
        The network, which is not changed.
    vocabulary
        Result of `extended_vocabulary`.
    expression_BV
        log1p of counts per 10,000 of the new data by token id of `vocabulary`, shape (B, V).
    seed
        Seed of the decomposition.
    """
    n_old = network.config.n_tokens
    config = network.config.replace(
        n_tokens=len(vocabulary), classes={"gene_classifier": False, "n_novelty_components": 0}
    )
    extended = CellTransformer.for_vocabulary(config, vocabulary).to(network.embedding.gene.weight.device)
    state = extended.state_dict()
    for name, tensor in network.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            state[name] = tensor
        elif name in state:  # one row per token: the gene embedding, the bias of the gene head
            state[name] = torch.cat(
                [tensor, tensor[network.is_gene_V].mean(0, keepdim=True).expand_as(state[name][n_old:])]
            )
    old_VD = network.embedding.gene.weight.detach().cpu().numpy()
    new_rows = _predicted_embeddings(old_VD, network.is_gene_V.cpu().numpy(), expression_BV, seed)
    state["embedding.gene.weight"][n_old:] = torch.from_numpy(new_rows).to(state["embedding.gene.weight"])
    extended.load_state_dict(state)
    return extended.eval()


def _predicted_embeddings(
    old_VD: NDArray[np.float32], is_gene_V: NDArray[np.bool_], expression_BV: sparse.csr_matrix, seed: int
) -> NDArray[np.float32]:
    """Return the embeddings of the new tokens, which follow the first `len(old_VD)`, float32."""
    n_old = len(old_VD)
    loadings_VR = gene_loadings(expression_BV, N_COMPONENTS, seed).numpy().astype(np.float64)
    expressed_V = np.asarray((expression_BV > 0).sum(0)).ravel() > 0
    shared = np.flatnonzero(expressed_V[:n_old] & is_gene_V)
    if not len(shared):
        raise ModelTaskError(
            "The data and the model have no gene in common, so embeddings of new genes cannot be predicted. Check the names "
            "of the genes with `scfm.pp.check`."
        )
    scaler = StandardScaler().fit(loadings_VR[shared])
    regression = Ridge(alpha=RIDGE_PENALTY).fit(scaler.transform(loadings_VR[shared]), old_VD[shared])
    return np.asarray(regression.predict(scaler.transform(loadings_VR[n_old:])), dtype=np.float32)
