"""Value objectives against plain re-computation, one cell at a time."""

import pytest
import torch
from torch.nn import functional as F

from scfm.objectives import Integration, MaskedBuckets, MaskedValues, total
from scfm.objectives.integrate import elastic_similarity, reverse_gradient


def test_masked_values_hides_the_values_of_genes_alone(cells, is_gene_V, generator):
    inputs, targets = MaskedValues(is_gene_V=is_gene_V).corrupt(cells, generator)
    changed_T = inputs.values_T != cells.values_T
    assert changed_T.nonzero().squeeze(1).tolist() == targets["token_N"].tolist()
    assert is_gene_V[cells.gene_ids_T[changed_T].long()].all()
    assert (inputs.values_T[changed_T] == -1).all()
    assert torch.equal(targets["values_N"], cells.values_T[targets["token_N"]])
    assert torch.equal(inputs.gene_ids_T, cells.gene_ids_T)


def by_hand(network, inputs, targets):
    """GEP, MVC and their zero terms, a target at a time, as the formulas say."""
    hidden_TD = network(inputs)
    sums = {"gep": 0.0, "mvc": 0.0, "gep_zero": 0.0, "mvc_zero": 0.0}
    starts = inputs.cu_seqlens.tolist()
    for token, value in zip(targets["token_N"].tolist(), targets["values_N"].tolist()):
        cell = next(b for b in range(len(inputs)) if starts[b] <= token < starts[b + 1])
        state, cls = hidden_TD[token], hidden_TD[starts[cell]]
        gene = network.embedding.gene_norm(network.embedding.gene.weight[inputs.gene_ids_T[token]])
        if network.batch_labels is not None:
            batch = network.batch_labels(inputs.batch_ids_B[cell])
            state, cls = torch.cat([state, batch]), torch.cat([cls, batch])

        def mlp(module, x):
            x = F.leaky_relu(F.linear(x, module.linear1.weight, module.linear1.bias))
            x = F.leaky_relu(F.linear(x, module.linear2.weight, module.linear2.bias))
            return F.linear(x, module.linear3.weight, module.linear3.bias)[0]

        head = network.value_from_cell_head
        query = torch.sigmoid(head.query.weight @ gene + head.query.bias)
        sums["gep"] += (mlp(network.value_head.value, state) - value) ** 2
        sums["mvc"] += ((head.weight.weight @ query) @ cls - value) ** 2
        if network.value_head.nonzero is not None:
            for name, logit in (
                ("gep_zero", mlp(network.value_head.nonzero, state)),
                ("mvc_zero", (head.nonzero.weight @ query + head.nonzero.bias) @ cls),
            ):
                probability = torch.sigmoid(logit)
                sums[name] -= torch.log(probability if value > 0 else 1 - probability)
    return {name: value / len(targets["token_N"]) for name, value in sums.items()}


@pytest.mark.parametrize("batch_labels", [False, True])
def test_value_terms_are_those_of_the_formulas(cells, is_gene_V, make_network, generator, batch_labels):
    network = make_network(heads={"zeros": True, "batch_labels": batch_labels}, n_batches=3)
    objective = MaskedValues(is_gene_V=is_gene_V, cell_weight=0.5, zero_weight=2.0)
    inputs, targets = objective.corrupt(cells, generator)
    loss, expected = objective.loss(network, inputs, targets), by_hand(network, inputs, targets)
    assert set(loss) == set(expected)
    for name, term in loss.items():
        torch.testing.assert_close(term.mean, expected[name], rtol=1e-4, atol=1e-5)
    weighted = expected["gep"] + 0.5 * expected["mvc"] + 2 * expected["gep_zero"] + expected["mvc_zero"]
    torch.testing.assert_close(total(loss), weighted, rtol=1e-4, atol=1e-5)


def test_masked_buckets_takes_expressed_genes_and_scores_buckets(cells, is_gene_V, make_network):
    objective = MaskedBuckets(is_gene_V=is_gene_V, mask_fraction=0.5)
    buckets = cells.replace(values_T=cells.values_T.clamp(min=0))
    shares, generator = [], torch.Generator().manual_seed(0)
    for _ in range(200):
        inputs, targets = objective.corrupt(buckets, generator)
        token_N = targets["token_N"]
        assert (buckets.values_T[token_N] > 0).all()
        assert torch.equal(targets["buckets_N"], buckets.values_T[token_N].long())
        new_N = inputs.values_T[token_N]
        assert ((new_N == 6) | (new_N == buckets.values_T[token_N])).all()
        shares.append((new_N == 6).float().mean())
    assert abs(float(torch.stack(shares).mean()) - 0.9) < 0.02

    network = make_network(
        embedding={"values": "bucket", "n_value_bins": 7},
        heads={"values": "bucket", "values_from_cells": False},
        attention={"kind": "linear"},
        norm="pre",
    )
    logits_NS = network.values(network(inputs)[token_N])
    picked_N = logits_NS.log_softmax(-1)[torch.arange(len(token_N)), targets["buckets_N"]]
    torch.testing.assert_close(total(objective.loss(network, inputs, targets)), -picked_N.mean())


def test_elastic_similarity_is_that_of_the_formula():
    cell_BD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    pairs = []
    for i in range(5):
        for j in range(5):
            cosine = 0.0 if i == j else float(F.cosine_similarity(cell_BD[i], cell_BD[j], dim=0))
            pairs.append(1 - (max(cosine, 0.0) - 0.8) ** 2)
    assert float(elastic_similarity(cell_BD, 0.8).mean) == pytest.approx(sum(pairs) / 25, rel=1e-5)


def test_the_reversed_gradient_has_the_other_sign():
    x = torch.randn(3, 4, requires_grad=True)
    (reverse_gradient(x) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, -3 * x.detach() ** 2)


def test_integration_adds_similarity_and_reversed_batch_loss(cells, is_gene_V, make_network, generator):
    network = make_network(
        heads={"zeros": True, "batches": True, "batch_labels": True}, embedding={"batch_norm": "domain"}, n_batches=3
    )
    objective = Integration(is_gene_V=is_gene_V, batch_weight=0.3)
    inputs, targets = objective.corrupt(cells, generator)
    network.eval()
    loss, expected = objective.loss(network, inputs, targets), by_hand(network, inputs, targets)
    for name, value in expected.items():
        torch.testing.assert_close(loss[name].mean, value, rtol=1e-4, atol=1e-5)
    cell_BD = network(inputs)[cells.cu_seqlens[:-1].long()]
    logits_BC = network.batch_head(cell_BD)
    torch.testing.assert_close(loss["batch"].mean, F.cross_entropy(logits_BC, cells.batch_ids_B))
    torch.testing.assert_close(loss["similarity"].mean, elastic_similarity(cell_BD, 0.8).mean)
    assert (loss["similarity"].weight, loss["batch"].weight) == (10.0, 0.3)

    weight = network.blocks[0].feed_forward.up.weight
    reversed_grad = torch.autograd.grad(loss["batch"].mean, weight)[0]
    plain_grad = torch.autograd.grad(F.cross_entropy(logits_BC, cells.batch_ids_B), weight)[0]
    torch.testing.assert_close(reversed_grad, -plain_grad)


def test_domain_batch_norm_uses_the_statistics_of_each_domain(cells, make_network):
    network = make_network(embedding={"batch_norm": "domain"}, n_batches=3).train()
    plain = make_network()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if "batch_norm" not in k})
    with torch.no_grad():
        normed_TD = network(cells, hidden_layer=0)
        summed_TD = plain(cells, hidden_layer=0)
    domain_T = cells.batch_ids_B[cells.cell_of_token_T()]
    for domain in range(3):
        rows_ND = summed_TD[domain_T == domain]
        expected_ND = (rows_ND - rows_ND.mean(0)) / (rows_ND.var(0, correction=0) + 6.1e-5).sqrt()
        torch.testing.assert_close(normed_TD[domain_T == domain], expected_ND, rtol=1e-4, atol=1e-5)


def test_an_encoding_without_values_is_an_error(cells, is_gene_V, generator):
    with pytest.raises(ValueError, match="encoding with values"):
        MaskedValues(is_gene_V=is_gene_V).corrupt(cells.replace(values_T=None), generator)
