"""Profile objective: predict one part of a cell's counts from the embedding of the other part."""

# Axes: B cells, T packed tokens, N tokens with remaining counts, D model width, R components, V tokens of the vocabulary.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from scfm.data.batch import CellBatch
from scfm.models.initialize import GENE_SCALE
from scfm.models.network import CellTransformer
from scfm.nn import Block
from scfm.objectives.base import OBJECTIVES, Loss, PretrainingObjective, Targets, Term
from scfm.objectives.masked import values_of

if TYPE_CHECKING:
    from scfm.encoding import Encoding

N_START = 128  # components of the start, and at most the width of the network; weak ones have small loadings
N_READ = 128  # genes: shorter cells allow more cells per step, and cells embedded later may have more
ALL_GENES = (
    2**31 - 1
)  # tokens of a cell: if the first in rank were chosen before the split, the parts would not be independent


@dataclass(frozen=True)
class Profile:
    """Split the counts of each cell in two at random, encode one part by rank, and predict the other part.

    A fraction of each count, drawn from a binomial distribution, is kept; its rate differs between cells. The kept counts are
    ranked again, and the network embeds them. The loss is the negative multinomial log-likelihood of the remaining counts,
    divided by their number, averaged over cells. For counts with Poisson noise both parts are independent given the
    expression of the cell (count splitting, Neufeld et al. 2022), so noise that is specific to a gene cannot be predicted.

    The decoder is linear, as in LDVAE (Svensson et al. 2020): logits = W z + b, where z is the embedding of a cell, standardized
    over the batch. W and b are no part of the network: only the training needs them.

    Attributes
    ----------
    is_gene_V
        Whether each token is a gene, shape (V,), bool.
    medians_V
        Medians of the rank encoding, shape (V,), float64.
    lowest_rate, highest_rate
        Range of the fraction of the counts that is kept.
    n_read
        Maximum number of kept genes that the network reads, the first in rank. The others are neither read nor predicted.
    weights
        The decoder: a layer from cell embeddings to one logit per token. None if no loss is computed.

    Examples
    --------
    >>> import torch, scfm
    >>> cells = scfm.CellBatch(
    ...     gene_ids_T=torch.tensor([2, 3, 4], dtype=torch.int32), values_T=torch.tensor([90.0, 50, 1]), cu_seqlens=torch.tensor([0, 3])
    ... )
    >>> objective = scfm.objectives.Profile(is_gene_V=torch.arange(5) > 1, medians_V=torch.ones(5))
    >>> inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    >>> inputs.values_T is None, round(float(targets["weight_N"].sum()), 5)
    (True, 1.0)
    """

    is_gene_V: Tensor
    medians_V: Tensor
    lowest_rate: float = 0.2
    highest_rate: float = 0.6
    n_read: int = N_READ
    weights: nn.Module | None = None
    name: str = "profile"

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        is_gene_T, cell_T = self.is_gene_V[cells.gene_ids_T.long()], cells.cell_of_token_T()
        count_T = values_of(cells).double() * is_gene_T
        rate_B = self.lowest_rate + (self.highest_rate - self.lowest_rate) * torch.rand(len(cells), generator=generator)
        kept_T = torch.binomial(count_T, rate_B[cell_T].double(), generator=generator)
        rest_T = count_T - kept_T
        total_B = torch.zeros(len(cells), dtype=torch.float64).index_add(0, cell_T, rest_T)
        target_N = (rest_T > 0).nonzero().squeeze(1)
        targets = {
            "cell_N": cell_T[target_N],
            "gene_ids_N": cells.gene_ids_T[target_N].long(),
            "weight_N": (rest_T / total_B[cell_T])[target_N].float(),
        }
        return self._ranked(cells, kept_T, is_gene_T), targets

    def _ranked(self, cells: CellBatch, kept_T: Tensor, is_gene_T: Tensor) -> CellBatch:
        """Return the cells with the kept genes only, in the order of their new ranks; special tokens stay where they are."""
        is_first_T = cells.position_T() == 0
        edge_T = torch.where(is_first_T, torch.inf, -torch.inf).double()
        score_T = torch.where(is_gene_T, kept_T / self.medians_V[cells.gene_ids_T.long()], edge_T)
        order_T = torch.argsort(-score_T, stable=True)
        order_T = order_T[torch.argsort(cells.cell_of_token_T()[order_T], stable=True)]
        ranked = cells.replace(gene_ids_T=cells.gene_ids_T[order_T], values_T=None)
        visible = ranked.select_tokens(((kept_T > 0) | ~is_gene_T)[order_T])
        is_gene_T = self.is_gene_V[visible.gene_ids_T.long()]
        return visible.select_tokens((visible.position_T() < self.n_read) | ~is_gene_T)

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        cell_N, weight_N = targets["cell_N"], targets["weight_N"]
        assert self.weights is not None
        logits_BV = self.weights(standardized(network.embed_cells(inputs))).float()
        logits_BV = logits_BV.masked_fill(~network.is_gene_V, -torch.inf)
        weight_B = torch.zeros(len(inputs), device=weight_N.device).index_add(0, cell_N, weight_N)
        explained = (weight_N * logits_BV[cell_N, targets["gene_ids_N"]]).sum()
        return {"profile": Term((weight_B * logits_BV.logsumexp(1)).sum() - explained, weight_B.round().sum())}


def standardized(cell_BD: Tensor) -> Tensor:
    """Return cell embeddings with mean 0 and variance 1 over the cells of the batch, float32."""
    centered_BD = cell_BD.float() - cell_BD.float().mean(0)
    return centered_BD / (centered_BD.pow(2).mean(0) + 1e-6).sqrt()


def make_decoder(network: CellTransformer) -> nn.Linear:
    """Return a decoder that predicts the same profile for all cells: that of the gene head's bias, if the network has one."""
    config, gene_weight = network.config, network.embedding.gene.weight
    decoder = nn.utils.skip_init(nn.Linear, config.d_embedding, config.n_tokens, device=gene_weight.device)
    with torch.no_grad():
        decoder.weight.zero_()
        if network.gene_head is None:
            decoder.bias.zero_()
        else:
            decoder.bias.copy_(network.gene_head.bias)
    return decoder


@torch.no_grad()
def start(network: CellTransformer, loadings_VR: ArrayLike, totals_V: ArrayLike, *, seed: int = 0) -> None:
    """Initialize a network so that the first cell embeddings are a projection on the loadings.

    The loadings are rotated into all dimensions at random: a dimension that stays random would be noise of the embedding, and
    components that are dimensions of their own would all count the same after standardization. Blocks add nothing at first,
    nor does the rank of a token. The bias of the gene head, from which `make_decoder` takes that of the decoder, is the mean
    profile.

    Parameters
    ----------
    network
        Network to change in place.
    loadings_VR
        Loadings of Pearson residuals, each scaled by its strength, shape (V, R).
    totals_V
        Total counts of each gene over cells, or anything proportional to it, shape (V,).
    seed
        Seed of the rotation.
    """
    genes, is_gene_V = network.embedding.gene.weight, network.is_gene_V.cpu()
    loadings = torch.from_numpy(np.array(loadings_VR, dtype=np.float32))[:, : genes.shape[1]]
    loadings = loadings / loadings[is_gene_V].pow(2).mean().sqrt().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(genes.shape[1], genes.shape[1], generator=generator))
    spread = GENE_SCALE * loadings @ rotation[: loadings.shape[1]]
    genes[network.is_gene_V] = spread[is_gene_V].to(genes)
    if network.embedding.rank is not None:
        network.embedding.rank.weight.zero_()
    for block in network.blocks:
        assert isinstance(block, Block)
        block.attention.out.weight.zero_()
        block.feed_forward.down.weight.zero_()
    if network.gene_head is not None:
        totals = torch.from_numpy(np.array(totals_V, dtype=np.float64)) + 0.5
        network.gene_head.bias.copy_((totals / totals[is_gene_V].sum()).log())


def _profile(network: CellTransformer, encoding: Encoding) -> Profile:
    if encoding.medians is None:
        raise ValueError(f"The profile objective needs a rank encoding; this one is {encoding.config.kind!r}.")
    return Profile(
        is_gene_V=network.is_gene_V.cpu(),
        medians_V=torch.from_numpy(encoding.medians.copy()),
        n_read=min(N_READ, network.config.context_length - 2),
        weights=make_decoder(network),
    )


OBJECTIVES.add(
    "profile",
    PretrainingObjective(
        make=_profile,
        encoding_settings={"keep_counts": True, "context_length": ALL_GENES},
        # The start is good: at 1e-3, 50 steps took 0.05 of macro-F1 from it. The decoder starts from nothing, so it has to be faster.
        training_settings={"learning_rate": 2e-4, "embedding_learning_rate_scale": 5.0},
        start=start,
        n_components=N_START,
        residuals=True,
    ),
)
