"""What the classifier of a model says for the label of each cell, and what changed genes change of it."""

# Axes: B cells or variants, T tokens of several cells, P perturbed genes, V tokens of the vocabulary, D width of the class
# features, C classes.

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn.functional import log_softmax

from scfm.errors import ModelTaskError
from scfm.models.model import Model
from scfm.models.state import Calibration
from scfm.nn.class_heads import MAX_SCALED, GeneClassifier
from scfm.perturbation.edits import Editor, TokenCell


class LabelHead:
    """The classifier of a model, that of `scfm.tl.annotate`, in double precision, because changes of log-odds are small.

    The log-odds of a label are the mean of log(p / p') over the other labels, where p is the probability of the label and p'
    that of the other one. With log(p / (1 - p)), the most similar label would count alone, and genes that two similar
    types share would seem to speak against both.

    The logarithm of the ensemble's probability is a weighted sum over its members, so the log-odds are the sum of a part of
    the network and a part of gene expression.

    Parameters
    ----------
    model
        A model with a class head.
    expression_BV
        log1p counts per 10,000 of the cells by token id, shape (B, V); read if the model has linear members.

    Attributes
    ----------
    expression
        The part of the linear members; None if the network is alone.
    """

    def __init__(self, model: Model, expression_BV: csr_matrix | None = None) -> None:
        model.require_labels()
        kind = model.network.config.classes.kind
        if kind == "panel":
            raise ModelTaskError(
                "`measure` is 'label', but the class head of this model needs the states of all tokens, not one vector per "
                "cell. Use 'shift' or 'goal'."
            )
        self._head = copy.deepcopy(model.network.class_head).double().eval()
        fitted, classifier = model.calibration or Calibration(n_cells=0), model.network.gene_classifier
        self._weight, self.expression = 1 / fitted.transformer_temperature, None
        if classifier is not None and expression_BV is not None:
            self._weight, of_expression = (classifier.ensemble_weights / fitted.ensemble_temperature).tolist()
            self.expression = ExpressionPart(classifier, of_expression, expression_BV)

    @torch.no_grad()
    def predict(self, features_BD: Tensor) -> Tensor:
        """Return the most probable label of each cell, shape (B,), int64."""
        logits_BC = self._weight * log_softmax(self._head(features_BD.to(self._device).double()), -1).cpu()
        return (logits_BC if self.expression is None else logits_BC + self.expression.logits()).argmax(-1)

    def log_odds(self, features_BD: Tensor, label_B: Tensor) -> Tensor:
        """Return the network's part of the log-odds of the label of each cell, shape (B,), float64."""
        logits_BC = self._weight * self._head(features_BD.to(self._device).double())
        return _against_others(logits_BC, label_B.to(self._device))

    @property
    def _device(self) -> torch.device:
        return next(self._head.parameters()).device


class ExpressionPart:
    """The part of the linear members of an ensemble in the log-odds of labels. It is linear in scaled expression.

    Parameters
    ----------
    classifier
        The sum of the linear members.
    weight
        Its weight in the logarithm of the probability.
    expression_BV
        log1p counts per 10,000 of the cells by token id, shape (B, V).
    """

    def __init__(self, classifier: GeneClassifier, weight: float, expression_BV: csr_matrix) -> None:
        self._classifier, self._weight, self._expression_BV = classifier, weight, expression_BV
        self._scale_V = classifier.scale_V.cpu().numpy().astype(np.float64)
        self._weight_VC = weight * classifier.weight_VC.cpu().numpy().astype(np.float64)

    def logits(self) -> Tensor:
        """Return the weighted log-probabilities of the cells, shape (B, C), float64."""
        logits_BC = torch.from_numpy(self._classifier.logits(self._expression_BV)).double()
        return self._weight * log_softmax(logits_BC, -1)

    def digest(self) -> str:
        """Return a hash of the expression, on which effects depend."""
        parts = (self._expression_BV.indptr, self._expression_BV.indices, self._expression_BV.data)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def edit_effect(self, cell: int, label: int, genes: Sequence[int], editor: Editor) -> float:
        """Return what a perturbation of genes changes of the log-odds of the label of one cell.

        The editor changes the log-expression of the genes as it changes the values of tokens: deletion sets them to 0,
        overexpression to the largest of the cell, and "inhibit" and "activate" change their quantiles.
        """
        span = slice(*self._expression_BV.indptr[cell : cell + 2])
        before, genes_P = (
            TokenCell(self._expression_BV.indices[span], self._expression_BV.data[span]),
            np.asarray(genes),
        )
        after = editor.of_values().edit(before, genes)
        before_P, after_P = (self._scaled(genes_P, _values_of(genes_P, tokens)) for tokens in (before, after))
        return float((after_P - before_P) @ self._against_others(genes_P, np.full(len(genes_P), label)))

    def deletion_effects(self, gene_ids_T: NDArray[np.integer], cell_T: NDArray[np.int64], label_T: Tensor) -> Tensor:
        """Return what the deletion of one gene changes in each of T pairs of gene and cell, shape (T,), float64."""
        scaled_T = self._scaled(gene_ids_T, np.asarray(self._expression_BV[cell_T, gene_ids_T]).ravel())
        return torch.from_numpy(-scaled_T * self._against_others(gene_ids_T, label_T.numpy()))

    def _scaled(self, genes_P: NDArray[np.integer], values_P: NDArray[np.floating]) -> NDArray[np.float64]:
        """Values of genes as the linear members read them, shape (P,)."""
        return np.minimum(values_P * self._scale_V[genes_P], MAX_SCALED)

    def _against_others(self, gene_ids_T: NDArray[np.integer], label_T: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weight of a gene's scaled expression in the log-odds of a label, shape (T,)."""
        return _against_others(torch.from_numpy(self._weight_VC[gene_ids_T]), torch.from_numpy(label_T)).numpy()


def _against_others(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """Difference of the logit of each label and the mean of the others, shape (B,)."""
    own_B = logits_BC.gather(1, label_B[:, None])[:, 0]
    return own_B - (logits_BC.sum(1) - own_B) / (logits_BC.shape[1] - 1)


def _values_of(genes_P: NDArray[np.int64], cell: TokenCell) -> NDArray[np.float64]:
    """Values of genes in a cell, 0 where it has none, shape (P,)."""
    assert cell.values_N is not None
    is_gene_PN = genes_P[:, None] == cell.gene_ids_N
    return (is_gene_PN * cell.values_N.astype(np.float64)).sum(1)
