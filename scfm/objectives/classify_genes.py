"""Classification of genes: cross-entropy of the class of each labeled gene token."""

# Axes: T packed tokens, N labeled tokens, V tokens of the vocabulary, C classes.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.objectives.base import Loss, Targets, Term


@dataclass(frozen=True)
class GeneClassification:
    """Cross-entropy of the class of each labeled gene token, weighted by class: sum of w_c CE / sum of w_c over the batch.

    This is the gene classification of Geneformer (Theodoris et al. 2023): every gene has one class in all cells, and its
    token is classified in the context of each cell. The network needs a class head of kind "token".

    Attributes
    ----------
    labels_V
        Class of each token id, shape (V,), int64; -1 for a token that is not labeled, which is ignored.
    class_weights_C
        Weight of each class, shape (C,); None weights all equally.

    Examples
    --------
    >>> import torch, scfm
    >>> cells = scfm.CellBatch(gene_ids_T=torch.arange(2, 7, dtype=torch.int32), cu_seqlens=torch.tensor([0, 5]))
    >>> labels_V = torch.tensor([-1, -1, 0, -1, 1, -1, -1])
    >>> _, targets = scfm.objectives.GeneClassification(labels_V).corrupt(cells, torch.Generator())
    >>> targets["token_N"].tolist(), targets["labels_N"].tolist()
    ([0, 2], [0, 1])
    """

    labels_V: Tensor
    class_weights_C: Tensor | None = None
    name: str = "gene_classification"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        label_T = self.labels_V[cells.gene_ids_T.long()]
        token_N = (label_T >= 0).nonzero().squeeze(1)
        labels_N = label_T[token_N]
        weights_N = torch.ones(len(labels_N)) if self.class_weights_C is None else self.class_weights_C[labels_N]
        return cells, {"token_N": token_N, "labels_N": labels_N, "weights_N": weights_N}

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        logits_NC = network.class_logits(inputs).index_select(0, targets["token_N"]).float()
        loss_N = F.cross_entropy(logits_NC, targets["labels_N"], reduction="none")
        return {"gene_classification": Term((targets["weights_N"] * loss_N).sum(), targets["weights_N"].sum())}
