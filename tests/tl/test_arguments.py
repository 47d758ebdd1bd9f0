"""Arguments that cannot be used, and data without cells, are refused with a sentence of scfm."""

import re

import pytest
import torch

import scfm
from scfm.errors import CountsError, ScfmError

CONFIG = scfm.FitConfig(n_steps=1, tokens_per_step=1024)


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:40].copy()


@pytest.fixture(scope="module")
def model(adata):
    return scfm.fit(adata.copy(), config=CONFIG, context_length=32, progress=False)


QUERY = {"perturbation_key": "bulk_labels", "control": "CD19+ B"}


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "1", None, True])
def test_seeds_are_whole_numbers(adata, model, seed):
    for call in (
        lambda: scfm.fit(adata.copy(), seed=seed, config=CONFIG, progress=False),
        lambda: scfm.tl.perturb(adata, model, seed=seed, progress=False),
        lambda: scfm.tl.screen(adata, model, seed=seed, progress=False),
        lambda: scfm.tl.gene_network(adata, model, seed=seed, progress=False),
        lambda: scfm.tl.predict_perturbation(adata, model, predict=["CD74"], seed=seed, **QUERY),
        lambda: scfm.pretrain(["no.h5ad"], "run", seed=seed),
    ):
        with pytest.raises(ValueError, match=re.escape(f"`seed` is {seed!r}; it must be a whole number from 0")):
            call()


@pytest.mark.parametrize("hidden_layer", [1.5, "1", 99])
def test_hidden_layers_are_numbers_of_blocks(adata, model, hidden_layer):
    with pytest.raises(IndexError, match=re.escape(f"`hidden_layer` is {hidden_layer}; a network of")) as raised:
        scfm.tl.embed(adata.copy(), model, hidden_layer=hidden_layer)
    assert raised.traceback  # whoever keeps the error, as a notebook does, keeps its frames
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("n_neighbors", [0, -1, 2.5])
def test_neighbors_are_counted(adata, model, n_neighbors):
    with pytest.raises(ValueError, match=r"`n_neighbors` is .*; it must be a whole number of at least 1"):
        scfm.tl.map_reference(adata.copy(), adata, model, labels_key="bulk_labels", n_neighbors=n_neighbors)


def test_one_cell_cannot_be_learned_from(adata):
    with pytest.raises(CountsError, match="need two cells, and there is 1"):
        scfm.fit(adata[:1].copy(), config=CONFIG, progress=False)


NO_CELLS = {
    "attention": lambda none, model: scfm.tl.attention(none, model, ["CD74"]),
    "embed": lambda none, model: scfm.tl.embed(none, model),
    "fit": lambda none, model: scfm.fit(none, config=CONFIG, progress=False),
    "gene_embeddings": lambda none, model: scfm.tl.gene_embeddings(none, model),
    "gene_network": lambda none, model: scfm.tl.gene_network(none, model, progress=False),
    "map_reference": lambda none, model: scfm.tl.map_reference(none, none, model, labels_key="bulk_labels"),
    "perturb": lambda none, model: scfm.tl.perturb(none, model, progress=False),
    "screen": lambda none, model: scfm.tl.screen(none, model, progress=False),
    "predict_perturbation": lambda none, model: scfm.tl.predict_perturbation(none, model, predict=["CD74"], **QUERY),
}


@pytest.mark.parametrize("name", NO_CELLS)
def test_no_cells_are_refused(adata, model, name):
    with pytest.raises(ScfmError, match=r"hold no cells \(0 x 765\)"):
        NO_CELLS[name](adata[:0].copy(), model)


def test_two_columns_of_one_name_do_not_matter(adata, model):
    doubled = adata.copy()
    doubled.obs.insert(0, "twice", 1)
    doubled.obs.insert(0, "twice", 2, allow_duplicates=True)
    scfm.tl.embed(doubled, model)
    single, both = (
        scfm.fit(cells, config=CONFIG, context_length=32, progress=False) for cells in (adata.copy(), doubled)
    )
    assert single.id == both.id


def test_the_default_dtype_of_torch_does_not_matter(adata):
    results = []
    for dtype in (torch.float32, torch.float64):
        cells = adata.copy()
        torch.set_default_dtype(dtype)
        try:
            scfm.fit(cells, config=CONFIG, context_length=32, progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(cells.obsm["X_scfm"])
    assert results[1].dtype == results[0].dtype
    assert results[1].shape == results[0].shape
