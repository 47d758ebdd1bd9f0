"""A tiny network and a few hundred short cells, so that training tests take a second."""

from types import SimpleNamespace

import pytest
import torch

from scfm.data import CellBatch
from scfm.models import CellTransformer, ModelConfig
from scfm.objectives import Classification, MaskedGenes, Term
from scfm.objectives.base import count_of

N_TOKENS = 40


def make_cells(n_cells: int = 200, seed: int = 0) -> CellBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(3, 20, (n_cells,), generator=generator)
    labels_B = torch.randint(0, 3, (n_cells,), generator=generator)
    genes = [
        torch.randperm(N_TOKENS // 2, generator=generator)[:length] + 2 + 6 * label
        for length, label in zip(lengths_B.tolist(), labels_B.tolist())
    ]
    return CellBatch(
        gene_ids_T=torch.cat(genes).int(),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)]),
        cell_index_B=torch.arange(n_cells),
        labels_B=labels_B,
    )


def make_network(seed: int = 0, **changes) -> CellTransformer:
    torch.manual_seed(seed)
    settings = {"d_model": 32, "n_heads": 2, "n_layers": 2, "d_ff": 64, "context_length": 32, "dropout": 0.1, **changes}
    return CellTransformer(ModelConfig.from_dict({"n_tokens": N_TOKENS, **settings}), special_ids=(0, 1))


class EveryThirdGene:
    """Masks the genes whose id is a multiple of three: no randomness, so any way of batching asks the same."""

    name = "every_third_gene"

    def corrupt(self, cells, generator):
        token_N = (cells.gene_ids_T % 3 == 0).nonzero().squeeze(1)
        gene_ids_T = cells.gene_ids_T.clone()
        gene_ids_T[token_N] = 1
        return cells.replace(gene_ids_T=gene_ids_T), {
            "token_N": token_N,
            "gene_ids_N": cells.gene_ids_T[token_N].long(),
        }

    def loss(self, network, inputs, targets):
        logits = network.gene_logits(network(inputs)[targets["token_N"]])
        loss = torch.nn.functional.cross_entropy(logits, targets["gene_ids_N"], reduction="sum")
        return {self.name: Term(loss, count_of(targets["gene_ids_N"]))}


class WithWeights(EveryThirdGene):
    """Adds logits of a layer that is no part of the network."""

    name = "with_weights"

    def __init__(self):
        torch.manual_seed(0)
        self.weights = torch.nn.Linear(32, N_TOKENS)

    def loss(self, network, inputs, targets):
        hidden_ND = network(inputs)[targets["token_N"]]
        logits = network.gene_logits(hidden_ND) + self.weights(hidden_ND)
        loss = torch.nn.functional.cross_entropy(logits, targets["gene_ids_N"], reduction="sum")
        return {self.name: Term(loss, count_of(targets["gene_ids_N"]))}


@pytest.fixture
def tiny():
    network = make_network(classes={"n_classes": 3})
    return SimpleNamespace(
        network=network,
        cells=make_cells(),
        masked=MaskedGenes(mask_id=1, is_gene_V=network.is_gene_V),
        classify=Classification(),
        every_third=EveryThirdGene(),
        make_network=make_network,
        make_cells=make_cells,
    )
