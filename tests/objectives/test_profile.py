"""The profile objective: how counts are split, what the network reads, and what the loss is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import scfm
from scfm.data import CellBatch
from scfm.encoding import EncodingConfig, make_encoding
from scfm.models import CellTransformer
from scfm.objectives import OBJECTIVES, Profile, make_objective, total
from scfm.objectives.profile import make_decoder, start
from scfm.train.module import parameter_groups

N_TOKENS, FIRST_GENE = 60, 2


def network_of(n_tokens=N_TOKENS, **changes):
    torch.manual_seed(0)
    config = scfm.families.preset("small-rank").model_config(n_tokens=n_tokens, pad_id=0)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "dropout": 0.0, "context_length": 64}
    return CellTransformer(config.replace(**sizes, **changes), special_ids=(0, 1)).eval()


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    lengths = (20, 3, 40)
    ids = np.concatenate([FIRST_GENE + rng.permutation(N_TOKENS - FIRST_GENE)[:length] for length in lengths])
    return CellBatch(
        gene_ids_T=torch.from_numpy(ids.astype(np.int32)),
        values_T=torch.from_numpy(rng.integers(1, 30, len(ids)).astype(np.float32)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
    )


@pytest.fixture
def objective():
    medians_V = torch.from_numpy(np.random.default_rng(1).uniform(0.5, 4, N_TOKENS))
    return Profile(is_gene_V=torch.arange(N_TOKENS) >= FIRST_GENE, medians_V=medians_V)


def test_the_two_parts_of_a_count_follow_the_rates(cells, objective):
    """The remaining fraction of all counts is 1 - (0.2 + 0.6) / 2 on average, and weights of a cell sum to 1."""
    generator, visible = torch.Generator().manual_seed(0), []
    hundreds = cells.replace(values_T=torch.full_like(cells.values_T, 1.0))
    for _ in range(150):
        inputs, targets = objective.corrupt(hundreds, generator)
        sums_B = torch.zeros(3).index_add(0, targets["cell_N"], targets["weight_N"])
        torch.testing.assert_close(sums_B[sums_B > 0], torch.ones(int((sums_B > 0).sum())))
        visible.append(inputs.n_tokens / hundreds.n_tokens)
        # With counts of 1, a gene is either read or predicted.
        read = set(zip(inputs.cell_of_token_T().tolist(), inputs.gene_ids_T.tolist()))
        predicted = set(zip(targets["cell_N"].tolist(), targets["gene_ids_N"].tolist()))
        every = set(zip(cells.cell_of_token_T().tolist(), cells.gene_ids_T.tolist()))
        assert not read & predicted
        assert read | predicted == every
    assert np.mean(visible) == pytest.approx(0.4, abs=0.02)


def test_kept_counts_are_ranked_as_the_encoding_ranks_them():
    """With a rate of 1 the input is the rank encoding itself, with its special tokens."""
    adata = scfm.datasets.pbmc()[:6].copy()
    for settings in ({}, {"add_cls": True, "add_eos": True}, {"context_length": 40}):
        encoding = make_encoding(EncodingConfig(kind="rank", **settings), adata=adata)
        plain = scfm.pp.encode(adata, encoding)
        counted = scfm.pp.encode(adata, encoding.replace(keep_counts=True))
        is_gene_V = torch.zeros(len(encoding.vocabulary), dtype=torch.bool)
        is_gene_V[torch.from_numpy(encoding.vocabulary.gene_ids).long()] = True
        everything = Profile(
            is_gene_V, torch.from_numpy(encoding.medians.copy()), lowest_rate=1.0, highest_rate=1.0, n_read=10**6
        )
        shuffled, _ = everything.corrupt(counted, torch.Generator().manual_seed(0))
        assert plain.values_T is None
        assert torch.equal(plain.gene_ids_T, counted.gene_ids_T)
        assert torch.equal(shuffled.gene_ids_T, plain.gene_ids_T)
        assert torch.equal(shuffled.cu_seqlens.long(), plain.cu_seqlens.long())


def test_the_network_reads_the_first_genes_in_rank_of_a_part_of_all_counts(cells, objective):
    draws = [
        replace(objective, n_read=n_read).corrupt(cells, torch.Generator().manual_seed(0)) for n_read in (5, 10**6)
    ]
    (short, of_short), (complete, of_complete) = draws
    for cell in range(3):
        ids = [inputs.select([cell]).gene_ids_T.tolist() for inputs in (short, complete)]
        assert ids[0] == ids[1][:5]
    assert torch.equal(of_short["gene_ids_N"], of_complete["gene_ids_N"])
    adata = scfm.datasets.pbmc()[:3].copy()
    encoding = make_encoding(EncodingConfig(kind="rank", context_length=20), adata=adata)
    in_training = encoding.replace(**OBJECTIVES["profile"].encoding_settings)
    n_genes = (adata.X > 0).sum(1).ravel().tolist()[0]
    assert scfm.pp.encode(adata, in_training).lengths_B.tolist() == n_genes


def test_counts_that_are_kept_are_those_of_the_matrix():
    adata = scfm.datasets.pbmc()[:5].copy()
    encoding = make_encoding("rank", adata=adata).replace(keep_counts=True, context_length=50)
    cells = scfm.pp.encode(adata, encoding)
    matrix = adata.to_df()
    names = np.array(encoding.vocabulary.tokens)[cells.gene_ids_T.numpy()]
    expected = [
        matrix.iat[row, matrix.columns.get_loc(name)] for row, name in zip(cells.cell_of_token_T().tolist(), names)
    ]
    np.testing.assert_array_equal(cells.values_T.numpy(), np.array(expected, dtype=np.float32))
    with pytest.raises(ValueError, match="keep_counts"):
        EncodingConfig(kind="bin", keep_counts=True)
    assert "keep_counts" not in encoding.replace(keep_counts=False).config.to_dict()


def test_the_loss_is_the_multinomial_negative_log_likelihood(cells, objective):
    """NumPy computes it from the embedding and the weights, cell by cell, with a dense matrix of targets."""
    network = network_of()
    objective = replace(objective, weights=make_decoder(network))
    with torch.no_grad():
        for parameter in (*network.parameters(), *objective.weights.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(1))
    weight, bias = (parameter.detach().double().numpy() for parameter in objective.weights.parameters())
    z = network.embed_cells(inputs).detach().double().numpy()
    z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-6)
    logits = (z @ weight.T + bias)[:, FIRST_GENE:]
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    dense = np.zeros((3, N_TOKENS))
    dense[targets["cell_N"], targets["gene_ids_N"]] = targets["weight_N"]
    loss = total(objective.loss(network, inputs, targets))
    assert loss.item() == pytest.approx(-(dense[:, FIRST_GENE:] * logs).sum() / 3, rel=1e-5)
    loss.backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert all(name.startswith("gene_head.") for name in unused)
    assert objective.weights.weight.grad.abs().sum() > 0


def test_the_decoder_is_as_wide_as_the_embedding():
    network = network_of(pooling={"how": "concat"})
    assert make_decoder(network).weight.shape == (N_TOKENS, network.config.d_embedding)


def test_cells_without_remaining_counts_are_not_counted(objective):
    one = CellBatch(
        gene_ids_T=torch.tensor([4, 5], dtype=torch.int32),
        values_T=torch.tensor([1.0, 9.0]),
        cu_seqlens=torch.tensor([0, 1, 2], dtype=torch.int32),
    )
    network, generator = network_of(), torch.Generator().manual_seed(0)
    objective = replace(objective, weights=make_decoder(network))
    for _ in range(30):
        inputs, targets = objective.corrupt(one, generator)
        term = objective.loss(network, inputs, targets)["profile"]
        assert term.count == len(targets["cell_N"].unique())
        assert bool(term.sum.isfinite())


def test_a_network_at_the_start_projects_on_the_loadings_and_predicts_the_mean_profile(cells, objective):
    network, rng = network_of(), np.random.default_rng(2)
    loadings, totals = np.linalg.qr(rng.standard_normal((N_TOKENS, 5)))[0], rng.integers(1, 99, N_TOKENS).astype(float)
    start(network, loadings, totals, seed=3)
    genes = network.embedding.gene.weight[FIRST_GENE:].detach().numpy()
    # The embedding is the loadings up to a rotation and a factor: all angles between genes are the same.
    gram, expected = genes @ genes.T, loadings[FIRST_GENE:] @ loadings[FIRST_GENE:].T
    np.testing.assert_allclose(gram / np.trace(gram), expected / np.trace(expected), atol=1e-6)
    assert np.linalg.matrix_rank(genes, tol=1e-5) == 5
    inputs = cells.replace(values_T=None)
    torch.testing.assert_close(network(inputs), network(inputs, hidden_layer=0), atol=1e-5, rtol=0)
    _, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    objective = replace(objective, weights=make_decoder(network))
    mean_V = (totals + 0.5) / (totals + 0.5)[FIRST_GENE:].sum()
    expected = -(targets["weight_N"].numpy() * np.log(mean_V[targets["gene_ids_N"]])).sum() / 3
    assert total(objective.loss(network, inputs, targets)).item() == pytest.approx(expected, rel=1e-5)


def test_other_encodings_are_refused(cells, objective):
    adata = scfm.datasets.pbmc()[:20].copy()
    encoding = make_encoding("bin", adata=adata)
    with pytest.raises(ValueError, match="needs a rank encoding"):
        make_objective("profile", network_of(len(encoding.vocabulary)), encoding)
    with pytest.raises(ValueError, match="needs an encoding with values"):
        objective.corrupt(cells.replace(values_T=None), torch.Generator())


CONFIG = scfm.FitConfig(n_steps=15, tokens_per_step=12_000, learning_rate=3e-3, accelerator="cpu")
SHORT_CELLS = EncodingConfig(kind="rank", context_length=24)


def check_trained(model, adata):
    """The loss decreased, and the model encodes without counts."""
    losses = model.history["stages"][0]["losses"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.01
    assert model.objective == "profile"
    assert not model.encoding.config.keep_counts
    assert scfm.pp.encode(adata[:3], model).values_T is None


def test_fit_learns_profiles():
    adata = scfm.datasets.pbmc()[:100].copy()
    model = scfm.fit(adata, objective="profile", encoding=SHORT_CELLS, config=CONFIG, progress=False)
    check_trained(model, adata)
    untrained = scfm.families.preset("small-rank").model_config(n_tokens=model.network.config.n_tokens)
    names = set(CellTransformer(untrained).state_dict())
    assert not set(model.network.state_dict()) - names  # such as the decoder


def test_the_decoder_is_trained_with_its_own_settings_and_kept_in_checkpoints(tmp_path):
    adata = scfm.datasets.pbmc()[:40].copy()
    encoding = make_encoding(SHORT_CELLS, adata=adata)
    network = network_of(len(encoding.vocabulary))
    objective = make_objective("profile", network, encoding)
    cells = scfm.pp.encode(adata, encoding.replace(**OBJECTIVES["profile"].encoding_settings))
    config = CONFIG.replace(n_steps=2, embedding_learning_rate_scale=5.0, weight_decay=0.1, checkpoint_every=2)
    module = scfm.train.train(network, objective, cells, config, title="t", run_dir=tmp_path, progress=False)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = {
        names[id(parameter)]: (group["weight_decay"], group["lr"])
        for group in parameter_groups(network, module.config, objective.weights)
        for parameter in group["params"]
    }
    assert groups["objective_weights.weight"] == groups["network.embedding.gene.weight"] == (0.1, 5 * 3e-3)
    assert groups["objective_weights.bias"] == (0.0, 5 * 3e-3)
    assert objective.weights.weight.abs().sum() > 0
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(state["objective_weights.weight"], objective.weights.weight)


@pytest.mark.slow
def test_pretraining_on_files_learns_profiles_and_continues(tmp_path):
    adata = scfm.datasets.pbmc()[:100].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    settings = {"objective": "profile", "encoding": SHORT_CELLS}
    first = scfm.pretrain(tmp_path / "cells.h5ad", tmp_path / "run", config=CONFIG, progress=False, **settings)
    check_trained(first, adata)
    config = CONFIG.replace(n_steps=2)
    for number, objective in enumerate((None, "profile")):
        out = tmp_path / f"again{number}"
        again = scfm.pretrain(
            tmp_path / "cells.h5ad", out, init=first, objective=objective, config=config, progress=False
        )
        assert again.objective == "profile"
