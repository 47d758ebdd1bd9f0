"""Classification of genes by fine-tuning: each token is classified in the context of its cell, as in Geneformer."""

# Axes: T packed tokens, V tokens of the vocabulary, G labeled genes, D model width, C classes, X columns.

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from scfm import train
from scfm.data import CellBatch
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.objectives import GeneClassification, class_weights
from scfm.train import FitConfig

Folds = Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]
INVERSE_PENALTY = 0.1  # scikit-learn's C of the linear probe from which the head starts
MAX_PARAMETERS_TO_TRAIN_ALL = 20_000_000  # larger networks are fine-tuned by "lora:8"


def cross_validate_genes(
    model: Model,
    cells: CellBatch,
    *,
    gene_ids_G: NDArray[np.int64],
    codes_G: NDArray[np.int64],
    folds: Folds,
    config: FitConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> NDArray[np.int64]:
    """Predict the class of each gene by a model that was fine-tuned on the genes of the other folds.

    In each fold, a copy of the network gets a token head that starts from a linear probe. The copy is fine-tuned on the tokens
    of the training genes. Genes of the test fold stay in the cells as context, without a label. The predicted class of a test
    gene is the one with the largest mean log-probability over the cells in which the gene is a token.

    Parameters
    ----------
    model
        Left unchanged.
    cells
        Encoded by the model's encoding.
    gene_ids_G
        Token ids of the labeled genes, shape (G,). Each must occur in at least one cell.
    codes_G
        Their classes, shape (G,), 0 to C - 1.
    folds
        Pairs of training and test indices into `gene_ids_G`, as scikit-learn's splitters yield them.
    config
        Settings of the training in each fold; None for 60 steps.
    seed
        Seed of the training if `config` has none.
    progress
        Whether to show a progress bar for each fold.

    Returns
    -------
    Predicted classes, shape (G,), int64; -1 for a gene that is in no test fold.
    """
    config = (config or FitConfig()).with_defaults(**_default_settings(model), seed=seed)
    states_VD = _mean_over_cells(model.batches(cells), model.network, model.network.forward)
    predicted_G = np.full(len(gene_ids_G), -1, dtype=np.int64)
    for train_G, test_G in folds:
        network = _with_token_head(model.network, int(codes_G.max()) + 1)
        _start_from_probe(network, states_VD[gene_ids_G[train_G]], codes_G[train_G])
        labels_V = torch.full((network.config.n_tokens,), -1)
        labels_V[torch.from_numpy(gene_ids_G[train_G])] = torch.from_numpy(codes_G[train_G])
        objective = GeneClassification(labels_V, class_weights(labels_V, network.config.classes.n_classes, power=1.0))
        train.train(network, objective, cells, config, title="gene classes", progress=progress)
        finetuned = Model(network, model.encoding)
        log_proba_VC = _mean_over_cells(finetuned.batches(cells), network, _log_proba_of(network))
        predicted_G[test_G] = log_proba_VC[gene_ids_G[test_G]].argmax(1)
    return predicted_G


def _default_settings(model: Model) -> dict[str, Any]:
    if model.n_parameters <= MAX_PARAMETERS_TO_TRAIN_ALL:
        return {"n_steps": 60, "learning_rate": 2e-4, "trainable": "all"}
    return {"n_steps": 60, "learning_rate": 5e-4, "trainable": "lora:8"}


def _with_token_head(network: CellTransformer, n_classes: int) -> CellTransformer:
    """Copy a network and give it a head that classifies each token."""
    copied = copy.deepcopy(network)
    copied.add_class_head(n_classes, kind="token", gene_classifier=False)
    return copied


@torch.no_grad()
def _start_from_probe(network: CellTransformer, states_ND: NDArray[np.float64], codes_N: NDArray[np.int64]) -> None:
    """Fit a balanced logistic regression on the mean hidden vector of each gene, and copy it into the head."""
    scaler = StandardScaler().fit(states_ND)
    regression = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=2000)
    regression.fit(scaler.transform(states_ND), codes_N)
    weight_CD, bias_C = regression.coef_ / scaler.scale_, regression.intercept_
    bias_C = bias_C - weight_CD @ scaler.mean_
    if len(regression.classes_) == 2:  # scikit-learn stores one row for two classes
        weight_CD, bias_C = np.vstack([-weight_CD, weight_CD]) / 2, np.concatenate([-bias_C, bias_C]) / 2
    network.class_head.linear.weight.copy_(torch.from_numpy(weight_CD))
    network.class_head.linear.bias.copy_(torch.from_numpy(bias_C))


def _log_proba_of(network: CellTransformer) -> Callable[[CellBatch], Tensor]:
    return lambda batch: torch.log_softmax(network.class_logits(batch).float(), -1)


@torch.no_grad()
def _mean_over_cells(
    batches: Iterable[CellBatch], network: CellTransformer, function: Callable[[CellBatch], Tensor]
) -> NDArray[np.float64]:
    """Mean of a function of tokens over the cells in which a gene is a token, shape (V, X); NaN for a gene in no cell."""
    sum_VX: Tensor | None = None
    count_V = torch.zeros(network.config.n_tokens, dtype=torch.float64)
    for batch in batches:
        ids_T, value_TX = batch.gene_ids_T.long().cpu(), function(batch).double().cpu()
        if sum_VX is None:
            sum_VX = torch.zeros(len(count_V), value_TX.shape[1], dtype=torch.float64)
        sum_VX.index_add_(0, ids_T, value_TX)
        count_V.index_add_(0, ids_T, torch.ones(len(ids_T), dtype=torch.float64))
    assert sum_VX is not None, "pp.encode refuses an empty AnnData"
    return (sum_VX / count_V[:, None]).numpy()
