"""Classification of cells: cross-entropy, with weights for rare classes."""

# Axes: B cells, C classes.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.objectives.base import Loss, Targets, Term


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of the class of each cell, weighted by class: sum of w_c CE / sum of w_c over the batch.

    `class_weights_C` holds the weights of the classes; None for equal weights. Every cell of a batch must have a label.

    Examples
    --------
    >>> import scfm
    >>> scfm.objectives.Classification(label_smoothing=0.1).name
    'classification'
    """

    class_weights_C: Tensor | None = None
    label_smoothing: float = 0.0
    name: str = "classification"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        labels_B = cells.labels_B
        if labels_B is None or bool((labels_B < 0).any()):
            raise ValueError("Classification needs a label for every cell of the batch. Remove unlabeled cells.")
        weights_B = torch.ones(len(cells)) if self.class_weights_C is None else self.class_weights_C[labels_B]
        return cells, {"labels_B": labels_B, "weights_B": weights_B}

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        logits_BC = network.class_logits(inputs).float()
        loss_B = F.cross_entropy(logits_BC, targets["labels_B"], reduction="none", label_smoothing=self.label_smoothing)
        return {"classification": Term((targets["weights_B"] * loss_B).sum(), targets["weights_B"].sum())}


def class_weights(labels_B: Tensor, n_classes: int, power: float = 0.5) -> Tensor:
    """Return class weights proportional to 1 / n_c^power, with mean 1 over the cells, shape (C,).

    Parameters
    ----------
    labels_B
        Class of each cell, shape (B,), int64; -1 for an unlabeled cell, which is ignored.
    n_classes
        Number of classes C.
    power
        0 for equal weights of all cells, 1 for equal weights of all classes.

    Examples
    --------
    >>> import torch, scfm
    >>> labels = torch.tensor([0, 0, 0, 0, 1])
    >>> scfm.objectives.class_weights(labels, 2, power=1.0).tolist()  # a cell of the rare class weighs four times
    [0.625, 2.5]
    """
    counts_C = torch.bincount(labels_B[labels_B >= 0], minlength=n_classes).clamp(min=1).float()
    weights_C = counts_C.pow(-power)
    return weights_C * counts_C.sum() / (weights_C * counts_C).sum()
