"""Embeddings as published: layer, pooling, normalization, precision; and gene embeddings."""

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

import scfm


@pytest.fixture(scope="module")
def model():
    return scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=3), progress=False)


@pytest.fixture
def adata():
    return scfm.datasets.pbmc()[:40].copy()


def states(model, adata, hidden_layer):
    cells = scfm.pp.encode(adata, model)
    with torch.inference_mode():
        hidden_TD = model.network(cells.select(range(len(cells))), hidden_layer=hidden_layer).numpy()
    return cells, np.split(hidden_TD, cells.cu_seqlens[1:-1].numpy())


@pytest.mark.parametrize("hidden_layer", [-1, -2, 0])
@pytest.mark.parametrize(
    ("pooling", "pool"), [("mean", lambda x: x.mean(0)), ("max", lambda x: x.max(0)), ("cls", lambda x: x[0])]
)
def test_layer_and_pooling_are_those_asked_for(model, adata, hidden_layer, pooling, pool):
    scfm.tl.embed(adata, model, hidden_layer=hidden_layer, pooling=pooling)
    expected_BD = np.stack([pool(cell) for cell in states(model, adata, hidden_layer)[1]])
    np.testing.assert_allclose(adata.obsm["X_scfm"], expected_BD, rtol=0, atol=1e-5)
    assert adata.uns["scfm"]["X_scfm"]["pooling"] == pooling


def test_normalize_divides_by_the_length(model, adata):
    plain = scfm.tl.embed(adata, model, copy=True).obsm["X_scfm"]
    unit = scfm.tl.embed(adata, model, normalize=True, copy=True).obsm["X_scfm"]
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5, atol=1e-7)


def test_bfloat16_points_the_same_way_and_is_the_same_in_any_company(model, adata):
    full = scfm.tl.embed(adata, model, copy=True).obsm["X_scfm"]
    half = scfm.tl.embed(adata, model, precision="bf16", copy=True).obsm["X_scfm"]
    assert half.dtype == np.float32
    assert not np.array_equal(half, full)
    cosine = (half * full).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
    assert cosine.min() > 0.999
    for cell in (0, 17):
        alone = scfm.tl.embed(adata[[cell]].copy(), model, precision="bf16", copy=True).obsm["X_scfm"]
        assert np.array_equal(alone[0], half[cell])
    with pytest.raises(ValueError, match="precision"):
        scfm.tl.embed(adata, model, precision="fp8")


def test_gene_embeddings_are_means_over_the_cells_that_have_the_gene(model, adata):
    table = scfm.tl.gene_embeddings(adata, model, hidden_layer=-1, min_cells=3)
    cells, parts = states(model, adata, -1)
    hidden_TD, ids_T = np.concatenate(parts), cells.gene_ids_T.numpy()
    counts = np.bincount(ids_T, minlength=len(model.encoding.vocabulary))
    for gene in table.index[::50]:
        (token,) = model.encoding.vocabulary.token_ids([gene])
        assert counts[token] >= 3
        np.testing.assert_allclose(table.loc[gene], hidden_TD[ids_T == token].mean(0), rtol=0, atol=1e-5)
    assert len(table) == (counts >= 3).sum()


def test_gene_embeddings_without_cells_are_the_input_embeddings(model):
    table = scfm.tl.gene_embeddings(None, model)
    weight_VD = model.network.embedding.gene.weight.detach().numpy()
    np.testing.assert_array_equal(table.to_numpy(), weight_VD[model.encoding.vocabulary.gene_ids])


def test_a_progress_bar_counts_the_cells_unless_it_is_turned_off(model, adata, monkeypatch):
    bars = []
    monkeypatch.setattr("scfm.models.inference.tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    scfm.tl.embed(adata, model)
    scfm.tl.embed(adata, model, progress=False)
    scfm.tl.gene_embeddings(adata, model)
    scfm.tl.gene_embeddings(adata, model, progress=False)
    assert [bar.n for bar in bars] == [adata.n_obs, 0] * 2
    assert bars[0].unit == bars[2].unit == "cell"
