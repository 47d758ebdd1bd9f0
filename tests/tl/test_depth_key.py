"""Every function that reads counts takes `depth_key`, and reads the column."""

import inspect

import numpy as np
import pytest

import scfm
from scfm.errors import CountsError

QUICK = {"config": scfm.FitConfig(n_steps=1, tokens_per_step=512), "progress": False}
PUBLIC = [scfm.fit, scfm.pretrain, *(getattr(module, name) for module in (scfm.tl, scfm.pp) for name in module.__all__)]
TARGETS = {"perturbation_key": "target", "control": "control"}
CALLS = {
    "fit": lambda cells, _, key: scfm.fit(cells, depth_key=key, **QUICK),
    "annotate": lambda cells, model, key: scfm.tl.annotate(cells, model, depth_key=key),
    "integrate": lambda cells, model, key: scfm.tl.integrate(cells, model, batch_key="target", depth_key=key),
    "perturb": lambda cells, model, key: scfm.tl.perturb(cells, model, genes=["CD74"], depth_key=key),
    "screen": lambda cells, model, key: scfm.tl.screen(cells, model, depth_key=key),
    "attention": lambda cells, model, key: scfm.tl.attention(cells, model, ["CD74", "LYZ"], depth_key=key),
    "gene_network": lambda cells, model, key: scfm.tl.gene_network(cells, model, genes=["CD74", "LYZ"], depth_key=key),
    "predict": lambda cells, model, key: scfm.tl.predict_perturbation(
        cells, model, predict=["LYZ"], depth_key=key, **TARGETS
    ),
    "score": lambda cells, model, key: scfm.tl.score_perturbation_prediction(cells, model, depth_key=key, **TARGETS),
    "map_reference": lambda cells, model, key: scfm.tl.map_reference(
        cells, cells, model, labels_key="target", depth_key=key
    ),
}


@pytest.mark.parametrize("function", [f for f in PUBLIC if inspect.isfunction(f)], ids=lambda f: f.__name__)
def test_what_takes_a_layer_takes_a_depth(function):
    parameters = inspect.signature(function).parameters
    assert ("layer" in parameters) == ("depth_key" in parameters)


@pytest.fixture(scope="module")
def cells():
    adata = scfm.datasets.pbmc()[:40].copy()
    del adata.uns["scfm"]  # it names a column of depths
    adata.obs["deep"] = np.asarray(adata.X.sum(1)).ravel() * np.linspace(1, 60, adata.n_obs)
    adata.obs["target"] = ["control"] * 10 + ["LYZ", "CST3", "CD74"] * 10
    return adata


@pytest.fixture(scope="module")
def model(cells):
    settings = {"labels_key": "target", "encoding": "bin", "context_length": 64, "pretrain": False, "baselines": False}
    return scfm.fit(cells.copy(), **settings, **QUICK)


@pytest.mark.parametrize("name", CALLS)
def test_the_column_is_read(cells, model, name):
    with pytest.raises(CountsError, match="no such column"):
        CALLS[name](cells.copy(), model, "no such column")


def test_a_depth_that_is_given_is_one_that_the_data_name(cells, model):
    given, named = cells.copy(), cells.copy()
    named.uns["scfm"] = {"depth_key": "deep"}
    scfm.tl.annotate(given, model, depth_key="deep")
    scfm.tl.annotate(named, model)
    np.testing.assert_array_equal(given.obsm["scfm_proba"], named.obsm["scfm_proba"])
    summed = scfm.tl.annotate(cells, model, copy=True).obsm["scfm_proba"]
    assert (given.obsm["scfm_proba"] != summed).any()


def test_shuffled_cells_have_the_depths_that_a_model_finds(cells):
    """Tokens of this encoding depend on depth; the column is named by the model, or by the call."""
    settings = scfm.EncodingConfig(kind="bucket", depth_over="matrix")
    encoding = scfm.encoding.make_encoding(settings, adata=cells)
    vocabulary = encoding.vocabulary
    config = scfm.families.preset("scbert").model_config(
        n_tokens=len(vocabulary), pad_id=vocabulary.pad_id, context_length=len(vocabulary), d_model=16, n_heads=2,
        n_layers=1, d_ff=16, attention={"head_width": 8, "n_random_features": 8},
    )  # fmt: skip
    network = scfm.models.CellTransformer.for_vocabulary(config, vocabulary)
    models = [scfm.Model(network, each) for each in (encoding, encoding.replace(depth_key="deep"))]
    options = {"kind": "deletion", "genes": ["CD74", "LYZ", "CST3"], "n_shuffles": 2, "progress": False}
    given = scfm.tl.gene_network(cells, models[0], depth_key="deep", **options)
    assert scfm.tl.gene_network(cells, models[1], **options).equals(given)
    assert not scfm.tl.gene_network(cells, models[0], **options).equals(given)
