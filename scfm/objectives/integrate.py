"""Integration of experimental batches: cell embeddings that do not reveal the batch (scGPT)."""

# Axes: B cells, T packed tokens, D model width.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.objectives.base import Loss, Targets, Term, count_of
from scfm.objectives.masked import MaskedValues
from scfm.objectives.values import value_terms


@dataclass(frozen=True)
class Integration:
    """Losses on masked values (GEP, MVC and zero probabilities) and on cell embeddings (ECS and DAR).

    ECS (elastic cell similarity) is the mean over pairs of cells of 1 - (relu(cos_ij) - beta)^2, with cos_ii set to 0; it
    makes similar cells more similar, and others less. DAR (domain adaptation by reverse backpropagation) is the
    cross-entropy of a discriminator that predicts the batch from the embedding, with its gradient reversed. GEP and MVC are
    those of `MaskedValues`. A term with weight 0 is not computed.

    Examples
    --------
    >>> import torch, scfm
    >>> cells = scfm.CellBatch(
    ...     gene_ids_T=torch.arange(2, 12, dtype=torch.int32),
    ...     values_T=torch.arange(10.0),
    ...     cu_seqlens=torch.tensor([0, 6, 10]),
    ...     batch_ids_B=torch.tensor([0, 1]),
    ... )
    >>> settings = scfm.families.preset("small-bin").for_objective("generative")
    >>> config = settings.model_config(n_tokens=12, n_batches=2, heads={"batches": True, "zeros": True})
    >>> network = scfm.models.CellTransformer(config, special_ids=(0, 1))
    >>> objective = scfm.objectives.Integration(is_gene_V=network.is_gene_V)
    >>> sorted(objective.loss(network, *objective.corrupt(cells, torch.Generator().manual_seed(0))))
    ['batch', 'gep', 'gep_zero', 'mvc', 'mvc_zero', 'similarity']
    """

    is_gene_V: Tensor
    mask_fraction: float = 0.4
    cell_weight: float = 1.0
    zero_weight: float = 1.0
    similarity_weight: float = 10.0
    similarity_threshold: float = 0.8
    batch_weight: float = 1.0
    name: str = "integration"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        if self.batch_weight and cells.batch_ids_B is None:
            raise ValueError("Integration needs the experimental batch of every cell (`batch_ids_B`).")
        return MaskedValues(is_gene_V=self.is_gene_V, mask_fraction=self.mask_fraction).corrupt(cells, generator)

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        hidden_TD = network(inputs)
        loss = value_terms(
            network, hidden_TD, inputs, targets, cell_weight=self.cell_weight, zero_weight=self.zero_weight
        )
        cell_BD = network.pool(hidden_TD, inputs).float()
        if self.similarity_weight:
            loss["similarity"] = elastic_similarity(cell_BD, self.similarity_threshold, self.similarity_weight)
        if self.batch_weight:
            assert network.batch_head is not None, "set `batch_head=True` and `n_batches` in the ModelConfig"
            assert inputs.batch_ids_B is not None
            logits = network.batch_head(reverse_gradient(cell_BD)).float()
            cross_entropy = F.cross_entropy(logits, inputs.batch_ids_B, reduction="sum")
            loss["batch"] = Term(cross_entropy, count_of(inputs.batch_ids_B), self.batch_weight)
        return loss


def elastic_similarity(cell_BD: Tensor, threshold: float, weight: float = 1.0) -> Term:
    """Elastic cell similarity (ECS): 1 - (relu(cos_ij) - threshold)^2 over all pairs, cos_ii set to 0."""
    unit_BD = F.normalize(cell_BD, dim=1)
    cosine_BB = unit_BD @ unit_BD.T
    cosine_BB = cosine_BB.masked_fill(torch.eye(len(cell_BD), dtype=torch.bool, device=cell_BD.device), 0.0)
    pairs_BB = 1 - (F.relu(cosine_BB) - threshold) ** 2
    return Term(pairs_BB.sum(), count_of(pairs_BB), weight)


def reverse_gradient(tensor: Tensor) -> Tensor:
    """Return a tensor unchanged, and reverse the sign of its gradient (Ganin et al. 2016)."""
    return _ReverseGradient.apply(tensor)


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return -grad[0]
