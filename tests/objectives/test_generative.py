"""Generative objective and step-wise generation."""

import pytest
import torch

from scfm.data import CellBatch
from scfm.models import generate
from scfm.objectives import Generative, MaskedValues, at_step


def test_known_tokens_come_first_and_nothing_is_lost(cells, is_gene_V):
    seen = set()
    for seed in range(20):
        inputs, targets = Generative(is_gene_V=is_gene_V).corrupt(cells, torch.Generator().manual_seed(seed))
        values_T = inputs.values_T.index_copy(0, targets["token_N"], targets["values_N"])
        for cell, (start, stop) in enumerate(zip(cells.cu_seqlens[:-1].tolist(), cells.cu_seqlens[1:].tolist())):
            n_known = int(inputs.n_known[cell])
            before = sorted(zip(cells.gene_ids_T[start:stop].tolist(), cells.values_T[start:stop].tolist()))
            after = sorted(zip(inputs.gene_ids_T[start:stop].tolist(), values_T[start:stop].tolist()))
            assert before == after
            assert inputs.gene_ids_T[start] == cells.gene_ids_T[start]  # <cls> stays first
            unknown = [place for place in targets["token_N"].tolist() if start <= place < stop]
            assert unknown == list(range(start + n_known, stop))
            assert n_known >= 2  # <cls> and a gene
            if cell == 1:
                seen.add((stop - start - n_known) / (stop - start - 1))
    assert {round(share, 1) for share in seen} <= {0.2, 0.5, 0.8}
    assert len(seen) == 3
    assert (inputs.values_T[targets["token_N"]] == -1).all()


@pytest.mark.parametrize("target_input", ["value", "flag"])
def test_each_unknown_gene_is_predicted_as_if_it_were_the_only_one(cells, is_gene_V, make_network, target_input):
    # Known tokens never see unknown ones, and unknown ones not each other: taking all others away changes nothing.
    network = make_network(embedding={"target_input": target_input}).eval()
    inputs, targets = Generative(is_gene_V=is_gene_V).corrupt(cells, torch.Generator().manual_seed(1))
    is_target_T = torch.zeros(cells.n_tokens, dtype=torch.bool).index_fill(0, targets["token_N"], True)
    with torch.no_grad():
        together_N = network.values(network(inputs)[targets["token_N"]])
        for n, token in enumerate(targets["token_N"].tolist()):
            keep_T = ~is_target_T
            keep_T[token] = True
            alone = inputs.select_tokens(keep_T).replace(n_known=inputs.n_known)
            value = network.values(network(alone)[int(keep_T[:token].sum())][None])
            torch.testing.assert_close(value[0], together_N[n], rtol=1e-4, atol=1e-5)


def test_the_second_pass_starts_from_the_detached_cell_embedding(cells, is_gene_V, make_network, generator):
    network = make_network().eval()
    objective = Generative(is_gene_V=is_gene_V, second_pass=True)
    inputs, targets = objective.corrupt(cells, generator)
    loss = objective.loss(network, inputs, targets)
    assert set(loss) == {"gep", "mvc", "gep_from_cell"}
    cell_BD = network.pool(network(inputs), inputs).detach()
    plan, token_N = network.plan(inputs), targets["token_N"]
    hidden_TD = network.embed_tokens(inputs, plan).detach().clone()
    hidden_TD[inputs.cu_seqlens[:-1].long()] = cell_BD
    for block in network.blocks:
        hidden_TD = block(hidden_TD, plan)
    expected = ((network.values(hidden_TD[token_N]) - targets["values_N"]) ** 2).mean()
    torch.testing.assert_close(loss["gep_from_cell"].mean, expected)


def test_the_second_pass_comes_at_its_step(is_gene_V):
    late = Generative(is_gene_V=is_gene_V, second_pass_from=1000)
    assert not at_step(late, 999).second_pass
    assert at_step(late, 1000).second_pass
    assert not at_step(Generative(is_gene_V=is_gene_V), 10**6).second_pass
    masked = MaskedValues(is_gene_V=is_gene_V)
    assert at_step(masked, 1000) is masked


def test_skipping_the_output_projection_changes_unknown_tokens_as_published(cells, is_gene_V, make_network, generator):
    network = make_network(attention={"skip_target_projection": True}).eval()
    inputs, targets = Generative(is_gene_V=is_gene_V).corrupt(cells, generator)
    attention, plan = network.blocks[0].attention, network.plan(inputs)
    with torch.no_grad():
        hidden_TD = network.embed_tokens(inputs, plan)
        nothing_TD = torch.zeros_like(hidden_TD)  # in place of the residual
        out_TD = attention(nothing_TD, hidden_TD, plan)
        attention.skip_unknown_out = False
        projected_TD = attention(nothing_TD, hidden_TD, plan)
        attention.out.weight.copy_(torch.eye(16))
        attention.out.bias.zero_()
        mixed_TD = attention(nothing_TD, hidden_TD, plan)
    token_N = targets["token_N"]
    known_T = torch.ones(cells.n_tokens, dtype=torch.bool).index_fill(0, token_N, False)
    torch.testing.assert_close(out_TD[token_N], mixed_TD[token_N])
    torch.testing.assert_close(out_TD[known_T], projected_TD[known_T])


def split(cells, wanted_T):
    wanted = cells.select_tokens(wanted_T)
    return cells.select_tokens(~wanted_T), wanted


def test_generation_in_one_step_is_one_forward_pass(cells, is_gene_V, make_network):
    network = make_network().eval()
    inputs, targets = Generative(is_gene_V=is_gene_V).corrupt(cells, torch.Generator().manual_seed(1))
    prompt, wanted = split(inputs, inputs.values_T == -1)
    with torch.no_grad():
        expected = network.values(network(inputs)[targets["token_N"]]).clamp(min=0)
    torch.testing.assert_close(generate(network, prompt, wanted), expected)


def test_generation_step_by_step_feeds_the_least_uncertain_genes_back(make_network):
    network = make_network().eval()
    prompt = CellBatch(
        gene_ids_T=torch.tensor([2, 5, 6], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
        values_T=torch.tensor([-2.0, 3.0, 1.0]),
    )
    wanted_ids = [9, 12, 20, 30]
    wanted = CellBatch(
        gene_ids_T=torch.tensor(wanted_ids, dtype=torch.int32), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
    )
    values = generate(network, prompt, wanted, n_steps=2)

    known = dict(zip([2, 5, 6], [-2.0, 3.0, 1.0]))
    unknown = list(wanted_ids)
    for due in (2, 2):
        ids = [*known, *unknown]
        batch = CellBatch(
            gene_ids_T=torch.tensor(ids, dtype=torch.int32),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            values_T=torch.tensor([*known.values(), *[-1.0] * len(unknown)]),
            n_known=torch.tensor([len(known)], dtype=torch.int32),
        )
        with torch.no_grad():
            hidden = network(batch)
            own = network.values(hidden[len(known) :]).clamp(min=0)
            cell = network.values_from_cells(hidden[:1].expand(len(unknown), -1), torch.tensor(unknown))
        surest = (own - cell).abs().argsort()[:due].tolist()
        chosen = sorted(surest)
        known |= {unknown[place]: float(own[place]) for place in chosen}
        unknown = [gene for place, gene in enumerate(unknown) if place not in chosen]
    torch.testing.assert_close(values, torch.tensor([known[gene] for gene in wanted_ids]), rtol=1e-4, atol=1e-5)
