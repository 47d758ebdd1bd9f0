"""Read-depth-aware masked regression: predict the values of a cell from a downsampled copy (scFoundation)."""

# Axes: B cells, T packed tokens, N masked tokens.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.nn.values import MASK_VALUE
from scfm.objectives.base import OBJECTIVES, Loss, PretrainingObjective, Targets, special_token
from scfm.objectives.masked import values_of
from scfm.objectives.values import squared_error

if TYPE_CHECKING:
    from scfm.encoding import Encoding


@dataclass(frozen=True)
class ReadDepth:
    """Predicts the original values of masked genes from a binomial downsample of the cell.

    With probability `downsample_probability` the counts of a cell are downsampled: count' ~ Binomial(count, r) with r
    uniform in [`lowest_rate`, 1], values' = log1p(count' / total' x target_sum), S = log10 total', T = log10 total. A
    fraction `mask_fraction` of the genes with a value above 0 and a fraction `mask_fraction_zero` of the others are targets.
    The values of 80 % of the targets are replaced by the mask value, those of 10 % by the value of a random gene of the
    batch, and 10 % are unchanged. The loss is sum (pred - original)^2 / N over the N targets.

    With ``masked=False`` nothing is masked and every gene is a target, which is the situation of `scfm.tl.denoise`. A
    network trained with masking predicts too much expression for genes without counts, because 30 % of the expressed genes
    but only 3 % of the others are targets.

    The cells must contain all genes of the vocabulary (`include_zeros=True`). The published code draws r from another
    distribution.

    Examples
    --------
    >>> import numpy as np, torch, scfm
    >>> names = ["ACTB", "CD74", "GCG"]
    >>> vocabulary = scfm.Vocabulary.from_genes(names, special=("target_depth", "source_depth"))
    >>> encoding = scfm.encoding.make_encoding(
    ...     scfm.EncodingConfig(kind="continuous", include_zeros=True), vocabulary=vocabulary
    ... )
    >>> cells = encoding.encode([[900, 100, 0]], scfm.encoding.GeneMap.from_names(names, vocabulary))
    >>> objective = scfm.objectives.ReadDepth(
    ...     is_gene_V=torch.tensor([False, False, True, True, True]), target_id=0, source_id=1, downsample_probability=1.0
    ... )
    >>> thinned, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    >>> target, source = thinned.values_T[-2:].tolist()
    >>> round(target, 2), source < target  # log10 of the target depth and of the remaining total
    (3.0, True)
    """

    is_gene_V: Tensor
    target_id: int
    source_id: int
    target_sum: float = 1e4
    downsample_probability: float = 0.5
    lowest_rate: float = 0.1
    mask_fraction: float = 0.3
    mask_fraction_zero: float = 0.03
    masked: bool = True
    name: str = "read_depth"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        original_T = values_of(cells)
        is_gene_T = self.is_gene_V[cells.gene_ids_T.long()]
        values_T = self._downsample(cells, original_T, is_gene_T, generator)
        if not self.masked:
            token_N = is_gene_T.nonzero().squeeze(1)
            return cells.replace(values_T=values_T), {"token_N": token_N, "values_N": original_T[token_N]}
        fraction_T = torch.where(values_T > 0, self.mask_fraction, self.mask_fraction_zero)
        target_T = is_gene_T & (torch.rand(cells.n_tokens, generator=generator) < fraction_T)
        token_N, genes = target_T.nonzero().squeeze(1), is_gene_T.nonzero().squeeze(1)
        fate_N = torch.rand(token_N.shape[0], generator=generator)
        random_N = values_T[genes[torch.randint(len(genes), token_N.shape, generator=generator)]]
        changed_N = torch.where(fate_N < 0.9, random_N, values_T[token_N]).masked_fill(fate_N < 0.8, MASK_VALUE)
        inputs = cells.replace(values_T=values_T.index_copy(0, token_N, changed_N))
        return inputs, {"token_N": token_N, "values_N": original_T[token_N]}

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        predicted_N = network.values(network.value_states(inputs)[targets["token_N"]])
        return {"read_depth": squared_error(predicted_N, targets["values_N"])}

    def _downsample(self, cells: CellBatch, values_T: Tensor, is_gene_T: Tensor, generator: torch.Generator) -> Tensor:
        """Return the values of the downsampled cells and of their depth tokens, shape (T,)."""
        cell_T = cells.cell_of_token_T()
        is_source_T = cells.gene_ids_T == self.source_id
        total_B = torch.ones(len(cells), dtype=torch.float64)
        total_B[cell_T[is_source_T]] = 10.0 ** values_T[is_source_T].double()
        thinned_B = torch.rand(len(cells), generator=generator) < self.downsample_probability
        rate_B = self.lowest_rate + (1 - self.lowest_rate) * torch.rand(len(cells), generator=generator)
        counts_T = (values_T.double().expm1() * total_B[cell_T] / self.target_sum).round() * is_gene_T
        rate_T = torch.where(thinned_B, rate_B, 1.0)[cell_T].double()
        kept_T = torch.binomial(counts_T, rate_T, generator=generator)
        depth_B = torch.zeros(len(cells), dtype=torch.float64).index_add(0, cell_T, kept_T)
        thin_T = torch.log1p(kept_T / depth_B.clamp(min=1)[cell_T] * self.target_sum)
        thin_T = torch.where(is_source_T, depth_B.clamp(min=1).log10()[cell_T], thin_T)
        is_target_T = cells.gene_ids_T == self.target_id
        thin_T = torch.where(is_target_T, total_B.log10()[cell_T], thin_T).to(values_T.dtype)
        return torch.where(thinned_B[cell_T], thin_T, values_T)


def _read_depth(network: CellTransformer, encoding: Encoding) -> ReadDepth:
    assert encoding.config.target_sum is not None  # every continuous encoding has one
    return ReadDepth(
        is_gene_V=network.is_gene_V.cpu(),
        target_id=special_token(encoding, "target_depth"),
        source_id=special_token(encoding, "source_depth"),
        target_sum=encoding.config.target_sum,
    )


# In training the decoder needs all genes of the vocabulary; later the encoder is used alone, on the expressed genes.
OBJECTIVES.add("read_depth", PretrainingObjective(make=_read_depth, encoding_settings={"include_zeros": True}))
