"""Masked objectives: predict hidden genes (rank encodings) or hidden values (other encodings)."""

# Axes: T packed tokens, N masked tokens, S buckets.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.nn.values import MASK_VALUE
from scfm.objectives.base import OBJECTIVES, Loss, PretrainingObjective, Targets, Term, count_of, special_token
from scfm.objectives.cross_entropy import linear_cross_entropy
from scfm.objectives.values import value_terms

if TYPE_CHECKING:
    from scfm.encoding import Encoding


def choose_tokens(eligible_T: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw each eligible token with probability `fraction`, and at least one; return indices, shape (N,), int64."""
    draw_T = torch.rand(eligible_T.shape[0], generator=generator).masked_fill(~eligible_T, 2.0)
    chosen_N = (draw_T < fraction).nonzero().squeeze(1)
    if chosen_N.numel() == 0 and bool(eligible_T.any()):
        chosen_N = draw_T.argmin().reshape(1)
    return chosen_N


@dataclass(frozen=True)
class MaskedGenes:
    """BERT's masked language modeling over gene ids, the pretraining of Geneformer (Theodoris et al. 2023).

    A fraction `mask_fraction` of the gene tokens are targets. Of these, 80 % are replaced by the mask token, 10 % by a
    random gene, and 10 % are unchanged.
    The loss is the cross-entropy over the whole vocabulary, averaged over the targets of the batch. Special tokens
    are neither masked nor drawn as random genes.

    Examples
    --------
    >>> import torch, scfm
    >>> objective = scfm.objectives.MaskedGenes(mask_id=1, is_gene_V=torch.arange(50) > 1)
    >>> ids = torch.arange(2, 42, dtype=torch.int32)
    >>> cells = scfm.CellBatch(gene_ids_T=ids, cu_seqlens=torch.tensor([0, 40], dtype=torch.int32))
    >>> corrupted, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    >>> bool((corrupted.gene_ids_T != ids).any())
    True
    """

    mask_id: int
    is_gene_V: Tensor
    mask_fraction: float = 0.15
    name: str = "masked_genes"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        gene_ids_T = cells.gene_ids_T.clone()
        token_N = choose_tokens(self.is_gene_V[gene_ids_T.long()], self.mask_fraction, generator)
        original_N = gene_ids_T[token_N]
        fate_N = torch.rand(token_N.shape[0], generator=generator)
        genes = self.is_gene_V.nonzero().squeeze(1).to(gene_ids_T.dtype)
        random_N = genes[torch.randint(len(genes), token_N.shape, generator=generator)]
        masked_N = torch.where(fate_N < 0.9, random_N, original_N)
        gene_ids_T[token_N] = masked_N.masked_fill(fate_N < 0.8, self.mask_id)
        targets = {"token_N": token_N, "gene_ids_N": original_N.long(), "plan": cells.plan_of_queries(token_N)}
        return cells.replace(gene_ids_T=gene_ids_T), targets

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        hidden_ND = network.states_at(inputs, targets["token_N"], targets.get("plan"))
        head, genes = network.gene_head, network.embedding.gene
        if head is None:
            raise ValueError("This network has no gene head. Set `heads.genes` in its ModelConfig.")
        cross_entropy = linear_cross_entropy(
            head.transformed(hidden_ND), genes.weight, head.bias, targets["gene_ids_N"]
        )
        return {"masked_genes": Term(cross_entropy, count_of(targets["gene_ids_N"]))}


@dataclass(frozen=True)
class MaskedValues:
    """Masked value regression (scGPT's GEP): the values of target genes are replaced by -1 and predicted.

    The loss is sum (pred - value)^2 / N over the N targets of the batch. `cell_weight` adds MVC, and `zero_weight` the zero
    probabilities; see `scfm.objectives.values.value_terms`.

    Examples
    --------
    >>> import torch, scfm
    >>> cells = scfm.CellBatch(
    ...     gene_ids_T=torch.arange(2, 7, dtype=torch.int32), values_T=torch.arange(5.0), cu_seqlens=torch.tensor([0, 5])
    ... )
    >>> objective = scfm.objectives.MaskedValues(is_gene_V=torch.arange(10) > 1)
    >>> inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    >>> inputs.values_T.tolist(), targets["values_N"].tolist()
    ([0.0, 1.0, -1.0, -1.0, -1.0], [2.0, 3.0, 4.0])
    """

    is_gene_V: Tensor
    mask_fraction: float = 0.4
    cell_weight: float = 0.0
    zero_weight: float = 0.0
    name: str = "masked_values"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        values_T = values_of(cells)
        token_N = choose_tokens(self.is_gene_V[cells.gene_ids_T.long()], self.mask_fraction, generator)
        return (
            cells.replace(values_T=values_T.index_fill(0, token_N, MASK_VALUE)),
            {"token_N": token_N, "values_N": values_T[token_N]},
        )

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        hidden_TD = network.value_states(inputs)
        return value_terms(
            network, hidden_TD, inputs, targets, cell_weight=self.cell_weight, zero_weight=self.zero_weight
        )


@dataclass(frozen=True)
class MaskedBuckets:
    """Masked bucket prediction (scBERT): predict the buckets of hidden genes.

    A fraction `mask_fraction` of the genes with a bucket above 0 are targets. The buckets of 90 % of them are replaced by
    the mask bucket, 10 % are unchanged. The loss is the cross-entropy over buckets, averaged over the targets of the batch.

    Examples
    --------
    >>> import torch, scfm
    >>> cells = scfm.CellBatch(
    ...     gene_ids_T=torch.arange(2, 7, dtype=torch.int32),
    ...     values_T=torch.tensor([0.0, 3.0, 1.0, 0.0, 5.0]),
    ...     cu_seqlens=torch.tensor([0, 5]),
    ... )
    >>> objective = scfm.objectives.MaskedBuckets(is_gene_V=torch.arange(10) > 1, mask_fraction=0.5)
    >>> inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    >>> inputs.values_T.tolist(), targets["buckets_N"].tolist()  # bucket 6 is the mask; genes in bucket 0 are not targets
    ([0.0, 3.0, 6.0, 0.0, 6.0], [1, 5])
    """

    is_gene_V: Tensor
    mask_bucket: int = 6
    mask_fraction: float = 0.15
    name: str = "masked_buckets"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        values_T = values_of(cells)
        eligible_T = self.is_gene_V[cells.gene_ids_T.long()] & (values_T > 0)
        token_N = choose_tokens(eligible_T, self.mask_fraction, generator)
        hidden_N = token_N[torch.rand(token_N.shape[0], generator=generator) < 0.9]
        inputs = cells.replace(values_T=values_T.index_fill(0, hidden_N, float(self.mask_bucket)))
        return inputs, {"token_N": token_N, "buckets_N": values_T[token_N].long()}

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        logits_NS = network.values(network(inputs)[targets["token_N"]]).float()
        cross_entropy = F.cross_entropy(logits_NS, targets["buckets_N"], reduction="sum")
        return {"masked_buckets": Term(cross_entropy, count_of(targets["buckets_N"]))}


def values_of(cells: CellBatch) -> Tensor:
    """Return the values of a batch, shape (T,); raise `ValueError` if it has none."""
    if cells.values_T is None:
        raise ValueError(
            "This objective needs an encoding with values (bin, bucket or continuous); a rank encoding has none."
        )
    return cells.values_T


def _masked_genes(network: CellTransformer, encoding: Encoding) -> MaskedGenes:
    return MaskedGenes(mask_id=special_token(encoding, "mask"), is_gene_V=network.is_gene_V.cpu())


def _masked_values(network: CellTransformer, encoding: Encoding) -> MaskedValues:
    cell_weight = float(network.value_from_cell_head is not None)
    return MaskedValues(is_gene_V=network.is_gene_V.cpu(), cell_weight=cell_weight)


def _masked_buckets(network: CellTransformer, encoding: Encoding) -> MaskedBuckets:
    assert encoding.config.n_bins is not None  # every bucket encoding has them
    return MaskedBuckets(is_gene_V=network.is_gene_V.cpu(), mask_bucket=encoding.config.n_bins)


OBJECTIVES.add("masked_genes", PretrainingObjective(make=_masked_genes))
OBJECTIVES.add("masked_values", PretrainingObjective(make=_masked_values))
OBJECTIVES.add("masked_buckets", PretrainingObjective(make=_masked_buckets))
