"""Masked genes: which tokens change, how often, and what the loss is."""

import pytest
import torch

from scfm.objectives import MaskedGenes, total

MASK = 1
GENES_ONLY = {
    "embedding": {"values": "none"},
    "heads": {"genes": True, "values": "none", "values_from_cells": False},
}


def test_shares_are_those_of_bert_and_specials_are_left_alone(cells, is_gene_V):
    objective = MaskedGenes(mask_id=MASK, is_gene_V=is_gene_V)
    generator, fates, chosen = torch.Generator().manual_seed(0), [], 0
    for _ in range(2000):
        inputs, targets = objective.corrupt(cells, generator)
        token_N, original_N = targets["token_N"], targets["gene_ids_N"]
        assert torch.equal(original_N, cells.gene_ids_T[token_N].long())
        assert is_gene_V[original_N].all()
        new_N = inputs.gene_ids_T[token_N].long()
        assert (is_gene_V[new_N] | (new_N == MASK)).all()
        untouched = torch.ones(cells.n_tokens, dtype=torch.bool).index_fill(0, token_N, False)
        assert torch.equal(inputs.gene_ids_T[untouched], cells.gene_ids_T[untouched])
        fates.append(torch.stack([new_N == MASK, new_N == original_N], 1))
        chosen += len(token_N)
    n_genes = int(is_gene_V[cells.gene_ids_T.long()].sum())
    assert chosen / (2000 * n_genes) == pytest.approx(0.15, abs=0.01)
    masked, kept = torch.cat(fates).float().mean(0).tolist()
    assert masked == pytest.approx(0.8, abs=0.015)
    assert kept == pytest.approx(0.1 + 0.1 / int(is_gene_V.sum()), abs=0.015)


def test_the_loss_is_the_cross_entropy_over_the_vocabulary(cells, is_gene_V, make_network, generator):
    network = make_network(**GENES_ONLY).eval()
    objective = MaskedGenes(mask_id=MASK, is_gene_V=is_gene_V)
    inputs, targets = objective.corrupt(cells, generator)
    with torch.no_grad():
        logits_NV = network.gene_logits(network(inputs)[targets["token_N"]])
        logs_N = logits_NV.log_softmax(-1)[torch.arange(len(logits_NV)), targets["gene_ids_N"]]
        torch.testing.assert_close(total(objective.loss(network, inputs, targets)), -logs_N.mean())


def test_a_batch_without_genes_has_loss_zero(cells, is_gene_V, make_network, generator):
    network = make_network(**GENES_ONLY).eval()
    bare = cells.replace(gene_ids_T=torch.full_like(cells.gene_ids_T, 2))
    objective = MaskedGenes(mask_id=MASK, is_gene_V=is_gene_V)
    assert float(total(objective.loss(network, *objective.corrupt(bare, generator)))) == 0
