"""`scfm.tl.screen`. Oracles: exact deletions, dense attention matrices in float64, simulated errors."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import scfm
from scfm.models import CellTransformer
from scfm.perturbation.screening.estimate import Estimator
from scfm.perturbation.screening.ranks import RankMoves, own_paths
from scfm.perturbation.screening.recall import recall_estimate

N_CELLS = 3


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()


@pytest.fixture(scope="module", params=["rank", "bin", "weighted"])
def model(request, adata):
    """Trained for a moment: on random weights every deletion does the same."""
    config = scfm.FitConfig(n_steps=40, tokens_per_step=2048)
    encoding = "rank" if request.param == "weighted" else request.param
    model = scfm.fit(adata.copy(), encoding=encoding, config=config, progress=False)
    if request.param == "weighted":
        model.network.config = model.network.config.replace(pooling={"how": "weighted"})
    return model


def test_held_estimates_rank_genes_as_exact_deletion_does(adata, model):
    exact = scfm.tl.perturb(adata[:N_CELLS], model, positions="held", n_bootstrap=0, progress=False)
    # A `cls` embedding has no own term: all that is known of a deletion lies in the projections.
    n_projections = 64 if model.network.config.pooling.how == "cls" else 8
    table = scfm.tl.screen(
        adata[:N_CELLS], model, positions="held", n_verify=0, n_bootstrap=0, n_projections=n_projections, progress=False
    )
    assert set(table.index) == set(exact.index)
    rank = spearmanr(table.loc[exact.index, "estimate_mean"], exact["shift_mean"]).statistic
    by_place = spearmanr(-table.loc[exact.index, "rank_only"], exact["shift_mean"]).statistic
    assert rank > 0.95
    assert rank > by_place
    assert len(set(exact.index[:50]) & set(table.index[:75])) >= 45
    assert not table["exact"].any()


def test_goal_estimates_rank_genes_as_exact_deletion_does(adata, model):
    state = {"groupby": "bulk_labels", "start": "Dendritic", "goal": "CD19+ B"}
    some = adata[[*np.flatnonzero(adata.obs["bulk_labels"] == "Dendritic")[:N_CELLS],
                  *np.flatnonzero(adata.obs["bulk_labels"] == "CD19+ B")[:10]]]  # fmt: skip
    exact = scfm.tl.perturb(some, model, **state, positions="held", n_bootstrap=0, progress=False)
    table = scfm.tl.screen(some, model, **state, positions="held", n_verify=0, n_bootstrap=0, progress=False)
    joined = table.loc[exact.index, "estimate_mean"]
    assert spearmanr(joined, exact["goal_shift_mean"]).statistic > 0.95
    # Not only the order: the size too, but for the few genes whose deletion is no small step.
    assert np.median(joined / exact["goal_shift_mean"]) == pytest.approx(1, abs=0.15)


def test_best_rows_are_exact_and_marked(adata, model):
    table = scfm.tl.screen(adata[:N_CELLS], model, n_verify=10, n_check=5, n_bootstrap=0, progress=False)
    exact = scfm.tl.perturb(adata[:N_CELLS], model, genes=table.index[table["exact"]], n_bootstrap=0, progress=False)
    assert table["exact"].sum() == 15
    pd.testing.assert_series_equal(table.loc[exact.index, "shift_mean"], exact["shift_mean"], rtol=1e-3)
    rest = table[~table["exact"]]
    pd.testing.assert_series_equal(rest["shift_mean"], rest["estimate_mean"], check_names=False)
    assert 0 <= table.attrs["recall_estimate"] <= 1
    assert 0 <= table.attrs["rank_only_recall"] <= 1


def test_rare_genes_are_neither_ranked_nor_counted_as_missed(adata, model, monkeypatch):
    asked = {}

    def spy(**given):
        asked.update(given)
        return recall_estimate(**given)

    monkeypatch.setattr(sys.modules["scfm.perturbation.screening.screen"], "recall_estimate", spy)
    table = scfm.tl.screen(
        adata[:N_CELLS], model, n_verify=6, n_check=3, min_cells=N_CELLS, n_bootstrap=0, progress=False
    )
    enough = table["n_cells"] >= N_CELLS
    assert 9 < enough.sum() < len(table)
    assert enough[table["exact"]].all()
    assert len(asked["estimate_U"]) == enough.sum() - 6


def test_bfloat16_estimates_rank_alike_and_verified_rows_stay_float32(adata, model):
    options = {"positions": "held", "n_bootstrap": 0, "progress": False}
    single = scfm.tl.screen(adata[:2], model, n_verify=0, **options)
    half = scfm.tl.screen(adata[:2], model, n_verify=5, n_check=0, precision="bf16", **options)
    joined = half.loc[single.index, "estimate_mean"]
    assert spearmanr(joined, single["estimate_mean"]).statistic > 0.97
    assert (joined != single["estimate_mean"]).any()
    verified = half.index[half["exact"]]
    exact = scfm.tl.perturb(adata[:2], model, genes=list(verified), positions="held", n_bootstrap=0, progress=False)
    pd.testing.assert_series_equal(half.loc[exact.index, "shift_mean"], exact["shift_mean"], rtol=1e-3)


def test_a_screen_does_not_depend_on_an_earlier_one_and_leaves_the_model_as_it_was(adata, model):
    options = {"n_verify": 0, "n_bootstrap": 0, "progress": False}
    state = vars(model).copy()
    first = scfm.tl.screen(adata[:N_CELLS], model, **options)
    scfm.tl.screen(adata[-N_CELLS:], model, **options)
    pd.testing.assert_frame_equal(scfm.tl.screen(adata[:N_CELLS], model, **options), first)
    assert vars(model) == state


def test_a_cell_gets_the_same_estimates_in_any_company(adata, model):
    cells = scfm.pp.encode(adata[:N_CELLS], model)
    direction = torch.linspace(-1, 1, model.network.config.d_model)
    alone, together = Estimator(model.network, cells.select([1])), Estimator(model.network, cells.select([0, 1, 2]))
    own = slice(*cells.cu_seqlens.tolist()[1:3])
    for one, of_all in zip(alone.along(direction[None]), together.along(direction.expand(3, -1))):
        torch.testing.assert_close(of_all[own], one, rtol=1e-4, atol=1e-9)
    for estimate in (
        lambda e: e.displacement(direction[:, None] / direction.norm()),
        lambda e: e.goal_shift(direction),
    ):
        one = estimate(alone)
        torch.testing.assert_close(estimate(together)[own], one, rtol=1e-3, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize(("pooling", "rtol"), [("mean", 1e-6), ("weighted", 1e-5)])  # weights and means are float32
def test_the_effect_along_a_direction_is_the_closed_form(adata, pooling, rtol):
    """Oracle: whole attention matrices in float64, gradients by autograd, loops over keys and later genes."""
    torch.manual_seed(0)
    model = scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=2, tokens_per_step=2048), progress=False)
    model.network.double()
    model.network.config = model.network.config.replace(pooling={"how": pooling})
    network, config = model.network, model.network.config
    cells = scfm.pp.encode(adata[:1], model)
    n_tokens = cells.n_tokens
    direction = torch.randn(config.d_model, dtype=torch.float64)

    rank = network.embedding.rank(torch.arange(n_tokens)).detach().requires_grad_()
    hidden = network.embedding.norm(network.embedding.genes(cells.gene_ids_T) + rank)
    kept = []
    for block in network.blocks:
        q, k, v = block.attention.qkv(hidden).view(n_tokens, 3, config.n_heads, config.d_head).unbind(1)
        probs = torch.softmax(torch.einsum("ihk,jhk->hij", q, k) * config.d_head**-0.5, -1)
        out = torch.einsum("hij,jhk->ihk", probs, v)
        kept.append((probs, v, out))
        hidden = block.attention_norm(hidden + block.attention.out(out.flatten(1)))
        inner = torch.relu(block.feed_forward.up(hidden))
        hidden = block.feed_forward_norm(hidden + block.feed_forward.down(inner))
    rank_T = torch.arange(n_tokens, dtype=torch.float32)
    weight_T = (50 / (50 + rank_T) if pooling == "weighted" else torch.ones_like(rank_T)).double()
    mean_D = weight_T @ hidden / weight_T.sum()
    value = mean_D @ direction
    *grads, grad_rank = torch.autograd.grad(value, [out for _, _, out in kept] + [rank])
    expected = torch.zeros(n_tokens, dtype=torch.float64)
    for gene in range(n_tokens):
        others = torch.arange(n_tokens) != gene
        for (probs, v, out), grad in zip(kept, grads):
            weight = (probs[:, others, gene] / (1 - probs[:, others, gene])).T
            expected[gene] += (weight[..., None] * grad[others] * (out[others] - v[gene])).sum()
        for later in range(gene + 1, n_tokens):
            expected[gene] += grad_rank[later] @ (network.embedding.rank.weight[later - 1] - rank[later])
            gain = (weight_T[later - 1] - weight_T[later]) / weight_T.sum()
            expected[gene] += gain * (hidden[later] - mean_D) @ direction
    found = sum(Estimator(model.network, cells).along(direction[None]))
    torch.testing.assert_close(found, expected.detach(), rtol=rtol, atol=1e-8 if pooling == "weighted" else 1e-12)


def test_ranks_that_move_up_are_exact_at_some_positions_and_between_them_if_their_embeddings_are_even(adata):
    """Oracle: the cell with the position of every later gene lowered by hand; positions along a line move it evenly."""
    model = scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=2, tokens_per_step=2048), progress=False)
    network, cells = model.network, scfm.pp.encode(adata[:2], model)
    network.config = network.config.replace(pooling={"how": "mean"})  # weights do not change evenly
    with torch.no_grad():
        weight = network.embedding.rank.weight
        step_D = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
        weight.copy_(torch.arange(len(weight))[:, None] * 1e-4 * step_D)
    before = torch.from_numpy(model.embed(cells))
    moves = RankMoves.of(network, network.embedding_readout, cells, before, 9)
    bounds, n_exact = cells.cu_seqlens.tolist(), 0
    for cell in range(2):
        for index in (*moves.exact_at[cell][[0, 3, -1]].tolist(), 17, 100):
            positions = torch.arange(bounds[cell + 1] - bounds[cell])
            positions[index + 1 :] -= 1
            one = cells.select([cell])
            with torch.inference_mode():
                plan = network.plan(one)
                hidden = network.embedding(one.gene_ids_T, None, positions)
                for block in network.blocks:
                    hidden = block(hidden, plan)
                moved = network.pool(hidden, one)
            expected = moved[0].double() - before[cell].double()
            found = moves.following(torch.zeros_like(moves.exact_TD), moves.exact_TD)[bounds[cell] + index]
            if index in moves.exact_at[cell]:  # the same sums in the same order, whatever the batch
                n_exact += 1
                assert torch.equal(found, expected)
            else:
                assert (found - expected).norm() <= 0.05 * expected.norm()
    assert n_exact == 6


def test_rough_ranks_do_not_mislead_the_goal_estimate(adata, monkeypatch):
    """After two steps rank embeddings are noise, beside gene embeddings that say little: the linear term follows badly."""
    model = scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=2, tokens_per_step=2048), progress=False)
    with torch.no_grad():
        model.network.embedding.rank.weight.mul_(2)
    state = {"groupby": "bulk_labels", "start": "Dendritic", "goal": "CD19+ B"}
    some = adata[[*np.flatnonzero(adata.obs["bulk_labels"] == "Dendritic")[:1],
                  *np.flatnonzero(adata.obs["bulk_labels"] == "CD19+ B")[:10]]]  # fmt: skip
    exact = scfm.tl.perturb(some, model, **state, n_bootstrap=0, progress=False)
    table = scfm.tl.screen(some, model, **state, n_verify=0, n_bootstrap=0, progress=False)
    with_moves = spearmanr(table.loc[exact.index, "estimate_mean"], exact["goal_shift_mean"]).statistic
    monkeypatch.setattr(Estimator, "rank_moves", lambda self, n_ranks: None)
    linear = scfm.tl.screen(some, model, **state, n_verify=0, n_bootstrap=0, progress=False)
    without_moves = spearmanr(linear.loc[exact.index, "estimate_mean"], exact["goal_shift_mean"]).statistic
    assert with_moves > 0.95
    assert with_moves > without_moves


def test_rough_ranks_do_not_mislead_the_undirected_estimate(adata, monkeypatch):
    """Straight lines between known ranks lose the best genes, and all directions for keys do not bring them back."""
    model = scfm.fit(adata.copy(), config=scfm.FitConfig(n_steps=2, tokens_per_step=2048), progress=False)
    model.network.config = model.network.config.replace(pooling={"how": "mean"})
    with torch.no_grad():
        model.network.embedding.rank.weight.mul_(4)
    exact = scfm.tl.perturb(adata[:1], model, n_bootstrap=0, progress=False)
    best, options = set(exact.index[:20]), {"n_verify": 0, "n_bootstrap": 0, "progress": False}
    found = len(best & set(scfm.tl.screen(adata[:1], model, **options).index[:30]))
    monkeypatch.setattr(
        "scfm.perturbation.screening.estimate.own_paths",
        lambda *_, states_TD, **__: torch.zeros_like(states_TD).double(),
    )
    by_lines = len(best & set(scfm.tl.screen(adata[:1], model, **options | {"n_projections": 128}).index[:30]))
    assert found >= 18
    assert by_lines < found


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_own_paths_agree_with_one_token_moved_at_a_time(adata, norm):
    """Oracle: whole attention matrices in float64, in which one query sees the keys of the cell as it is."""
    encoding = scfm.encoding.make_encoding("rank", adata=adata)
    config = scfm.ModelConfig(
        n_tokens=len(encoding.vocabulary), context_length=1024, norm=norm, final_norm=norm == "pre",
        d_model=16, n_heads=2, n_layers=2, d_ff=24,
    )  # fmt: skip
    torch.manual_seed(0)
    network = CellTransformer.for_vocabulary(config, encoding.vocabulary).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    cells = scfm.pp.encode(adata[:2], encoding)
    estimator = Estimator(network, cells)
    keys = estimator.keys
    found = own_paths(network, network.embedding_readout, cells, keys=keys, states_TD=estimator.states_TD.detach())
    start, stop = cells.cu_seqlens.tolist()[1:3]
    ids, step = cells.gene_ids_T[start:stop], torch.zeros(stop - start, 16, dtype=torch.float64)
    for place in range(1, stop - start):
        hidden = network.embedding(ids[place : place + 1], None, torch.tensor([place - 1]))
        for block, (k, v) in zip(network.blocks, keys):
            inner = block.attention_norm(hidden) if norm == "pre" else hidden
            q = block.attention.qkv(inner).view(3, 2, 8)[0]
            probs = torch.softmax(torch.einsum("hk,jhk->hj", q, k[start:stop]) * 8**-0.5, -1)
            hidden = hidden + block.attention.out(torch.einsum("hj,jhk->hk", probs, v[start:stop]).reshape(1, 16))
            hidden = hidden if norm == "pre" else block.attention_norm(hidden)
            inner = block.feed_forward_norm(hidden) if norm == "pre" else hidden
            hidden = hidden + block.feed_forward.down(torch.relu(block.feed_forward.up(inner)))
            hidden = hidden if norm == "pre" else block.feed_forward_norm(hidden)
        step[place] = (network.norm(hidden)[0] - estimator.states_TD[start + place]) / (stop - start)
    for place in (0, 3, stop - start - 2, stop - start - 1):
        torch.testing.assert_close(found[start + place], step[place + 1 :].sum(0).detach(), rtol=1e-6, atol=1e-12)


def test_recall_estimate_is_right_on_average():
    """Simulation: effects are log-normal, estimates carry log-normal errors; 50 wanted, 75 verified, 20 checked."""
    rng = np.random.default_rng(0)
    predicted, true = [], []
    for _ in range(40):
        exact = np.exp(rng.normal(0, 1, 800))
        estimate = exact * np.exp(rng.normal(0, 0.4, 800))
        order = np.argsort(-estimate)
        best, rest = order[:75], order[75:]
        checked = rng.choice(rest, 20, replace=False)
        predicted.append(
            recall_estimate(
                exact_V=exact[best], estimate_V=estimate[best], exact_C=exact[checked],
                estimate_C=estimate[checked], estimate_U=estimate[rest], n_top=50,
            )
        )  # fmt: skip
        true.append(np.isin(np.argsort(-exact)[:50], best).mean())
    assert np.mean(predicted) == pytest.approx(np.mean(true), abs=0.04)
    assert 0.6 < np.mean(true) < 0.98  # the case is neither hopeless nor trivial


def test_models_that_the_estimate_does_not_describe_are_refused(adata, model):
    changed = (
        scfm.Model(model.network, model.encoding.replace(include_zeros=True))
        if model.encoding.config.has_values
        else None
    )
    if changed is None:
        pytest.skip("rank encodings have no zeros")
    with pytest.raises(ValueError, match=r"does not remove a token.*scfm\.tl\.perturb"):
        scfm.tl.screen(adata[:2], changed, progress=False)
