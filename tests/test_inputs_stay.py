"""Every public function leaves its AnnData as it was, apart from what it says that it writes."""

import hashlib
import inspect
from collections import defaultdict

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scfm
from scfm.encoding import make_encoding
from scfm.errors import CountsError
from scfm.families import scfoundation
from scfm.models import CellTransformer, ModelConfig

N_CELLS, N_GENES = 60, 40
CONFIG = scfm.FitConfig(n_steps=1, tokens_per_step=1024)
QUIET = {"config": CONFIG, "progress": False}


def make_data():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1, 2, N_GENES) * np.exp(rng.normal(size=(3, N_GENES)))[np.arange(N_CELLS) % 3])
    counts[:, 0] += 1
    matrix = sp.csr_matrix(counts.astype(np.float32))
    for start, stop in zip(matrix.indptr, matrix.indptr[1:]):  # an order that a careless sort would change
        matrix.indices[start:stop], matrix.data[start:stop] = (
            matrix.indices[start:stop][::-1].copy(),
            matrix.data[start:stop][::-1].copy(),
        )
    matrix.has_sorted_indices = False
    adata = anndata.AnnData(matrix, var=pd.DataFrame(index=[f"SYN{index}A" for index in range(N_GENES)]))
    adata.obs_names = [f"cell{index}" for index in range(N_CELLS)]
    adata.obs["type"] = np.array(["a", "b", "c"], dtype=object)[np.arange(N_CELLS) % 3]
    adata.obs["donor"] = pd.Categorical(np.array(["x", "y"])[np.arange(N_CELLS) % 2])
    adata.obs["target"] = (["control"] * 30) + [f"SYN{index % 3}A" for index in range(30)]
    adata.obs["score"] = rng.random(N_CELLS)
    adata.var["note"] = [f"n{index}" for index in range(N_GENES)]
    adata.layers["other"] = np.asfortranarray(counts)
    adata.obsm["X_pca"] = rng.random((N_CELLS, 5))
    adata.varm["loadings"] = rng.random((N_GENES, 5))
    adata.obsp["distances"] = sp.random(N_CELLS, N_CELLS, 0.1, "csr", random_state=1)
    adata.uns["kept"] = {"a": [1, 2], "b": np.arange(3)}
    adata.raw = adata
    return adata


def make_models():
    """Return one model for each task: with labels, with values, for denoising."""
    encoding = make_encoding("continuous", adata=make_data())
    shape = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "context_length": 80}
    attention = {"kind": "linear", "qkv_bias": False, "head_width": 8, "n_random_features": 8}
    parts = {"decoder": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 64, "attention": attention}}
    config = ModelConfig.from_dict(
        {**scfoundation.ARCHITECTURE, **shape, **parts, "n_tokens": len(encoding.vocabulary)}
    )
    torch.manual_seed(0)
    denoiser = scfm.Model(CellTransformer.for_vocabulary(config, encoding.vocabulary), encoding)
    values = scfm.fit(make_data(), encoding="bin", **QUIET)
    labels = scfm.fit(make_data(), labels_key="type", encoding="rank", baselines=False, **QUIET)
    special = {"tl.integrate": values, "tl.denoise": denoiser, "tl.evaluate_denoising": denoiser}
    return defaultdict(lambda: labels, special)


@pytest.fixture(scope="module")
def models():
    return make_models()


GENES = ["SYN0A", "SYN1A"]

# Name: the call, and what it writes.
CALLS = {
    "encoding.make_encoding": (lambda a, m: scfm.encoding.make_encoding("rank", adata=a), set()),
    "pl.confusion": (lambda a, m: scfm.pl.confusion(a, truth="type", predicted="donor", show=False), set()),
    "pl.embedding": (
        lambda a, m: scfm.pl.embedding(a, color=["type", "score", "SYN0A"], basis="pca", show=False),
        set(),
    ),
    "pp.check": (lambda a, m: scfm.pp.check(a, m), set()),
    "pp.encode": (lambda a, m: scfm.pp.encode(a, m), set()),
    "pp.log_expression": (lambda a, m: scfm.pp.log_expression(a, m), set()),
    "tl.annotate": (
        lambda a, m: scfm.tl.annotate(a, m, majority_key="donor"),
        {"obs/scfm_label", "obs/scfm_confidence", "obs/scfm_novelty", "obsm/scfm_proba", "uns/scfm"},
    ),
    "tl.attention": (lambda a, m: scfm.tl.attention(a, m, genes=GENES), set()),
    "tl.classify_genes": (
        lambda a, m: scfm.tl.classify_genes(
            scfm.tl.gene_embeddings(a, m), {name: "odd" if i % 2 else "even" for i, name in enumerate(a.var_names)}, a
        ),
        set(),
    ),
    "tl.denoise": (lambda a, m: scfm.tl.denoise(a, m), {"layers/scfm_denoised", "uns/scfm"}),
    "tl.embed": (lambda a, m: scfm.tl.embed(a, m), {"obsm/X_scfm", "uns/scfm"}),
    "tl.evaluate_annotation": (
        lambda a, m: scfm.tl.evaluate_annotation(a, labels_key="type", seeds=[0], **QUIET),
        set(),
    ),
    "tl.evaluate_denoising": (lambda a, m: scfm.tl.evaluate_denoising(a, m), set()),
    "tl.evaluate_perturbation": (
        lambda a, m: scfm.tl.evaluate_perturbation(
            scfm.tl.perturb(a, m, genes=list(a.var_names[:8]), n_bootstrap=10, progress=False),
            list(a.var_names[:2]),
            a,
            groupby="type",
            group="a",
            n_components=3,
            n_permutations=5,
        ),
        set(),
    ),
    "tl.fit": (
        lambda a, m: scfm.fit(a, labels_key="type", batch_key="donor", baselines=False, **QUIET),
        {"obs/scfm_split", "obsm/X_scfm", "uns/scfm"},
    ),
    "tl.gene_embeddings": (lambda a, m: scfm.tl.gene_embeddings(a, m), set()),
    "tl.gene_network": (lambda a, m: scfm.tl.gene_network(a, m, n_shuffles=2, progress=False), set()),
    "tl.integrate": (
        lambda a, m: scfm.tl.integrate(a, m, batch_key="donor", method="train", **QUIET),
        {"obsm/X_scfm_integrated", "uns/scfm"},
    ),
    "tl.map_reference": (
        lambda a, m: scfm.tl.map_reference(a, make_data(), m, labels_key="type"),
        {
            *(f"obs/scfm_mapped_{name}" for name in ("label", "confidence", "distance")),
            *(f"obsm/scfm_mapped_{name}" for name in ("neighbors", "neighbor_distances")),
            "uns/scfm",
            "uns/scfm_mapped_report",
        },
    ),
    "tl.perturb": (
        lambda a, m: scfm.tl.perturb(a, m, genes=GENES, key_added="effects", n_bootstrap=10, progress=False),
        {"uns/effects", "uns/scfm"},
    ),
    "tl.predict_perturbation": (
        lambda a, m: scfm.tl.predict_perturbation(
            a, m, perturbation_key="target", control="control", predict=["SYN5A"]
        ),
        set(),
    ),
    "tl.score_perturbation_prediction": (
        lambda a, m: scfm.tl.score_perturbation_prediction(a, m, perturbation_key="target", control="control"),
        set(),
    ),
    "tl.screen": (
        lambda a, m: scfm.tl.screen(a, m, n_verify=3, n_check=3, n_projections=2, n_bootstrap=10, progress=False),
        set(),
    ),
}
NO_INPUT = {"tl.annotate_files", "tl.embed_files", "tl.map_reference_files", "tl.similar_genes", "tl.summarize_scores"}
NO_INPUT |= {
    f"pl.{name}" for name in ("attention", "gene_network", "perturbation", "report", "screen", "training", "volcano")
}


def digest(value):
    """Type, layout and content of anything that an AnnData may hold."""
    if isinstance(value, dict):
        return {name: digest(entry) for name, entry in value.items()}
    if sp.issparse(value):
        return (
            type(value).__name__,
            value.shape,
            *(digest(getattr(value, part)) for part in ("data", "indices", "indptr")),
        )
    if isinstance(value, np.ndarray) and value.dtype != object:
        layout = (value.dtype.str, value.shape, value.flags["F_CONTIGUOUS"])
        return (*layout, hashlib.sha256(value.tobytes()).hexdigest())
    if isinstance(value, pd.Series | pd.Index):
        return str(value.dtype), value.name, [repr(entry) for entry in value]
    return repr(value)


def parts_of(adata):
    """Digest of every part, by its path."""
    parts = {"X": digest(adata.X), "raw/X": digest(adata.raw.X), "obs names": digest(adata.obs_names)}
    parts |= {"var names": digest(adata.var_names), "raw names": digest(adata.raw.var_names)}
    for slot in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
        parts |= {f"{slot}/{name}": digest(getattr(adata, slot)[name]) for name in getattr(adata, slot)}
    return parts


@pytest.mark.parametrize("name", CALLS)
def test_the_input_stays_as_it_was(name, models):
    call, written = CALLS[name]
    adata = make_data()
    before = parts_of(adata)
    call(adata, models[name])
    after = parts_of(adata)
    assert {part: after.get(part) for part in before} == before
    assert set(after) - set(before) == written


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("pl.")])
def test_damaged_row_pointers_are_refused(name, models):
    """Below scipy they end in a segmentation fault, so nothing may slice the matrix before they are checked."""
    adata = make_data()
    adata.X.indptr[3] = 10**8
    if name == "pp.check":
        assert not CALLS[name][0](adata, models[name]).ok
        return
    with pytest.raises(CountsError, match="row pointers"):
        CALLS[name][0](adata, models[name])


def test_the_reference_stays_as_it_was(models):
    reference = make_data()
    before = parts_of(reference)
    scfm.tl.map_reference(make_data(), reference, models["tl.map_reference"], labels_key="type")
    assert parts_of(reference) == before


@pytest.mark.parametrize(
    "name", ["tl.annotate", "tl.denoise", "tl.embed", "tl.integrate", "tl.map_reference"]
)  # those with `copy=`
def test_a_copy_leaves_the_input_without_results(name, models):
    function = getattr(scfm.tl, name.removeprefix("tl."))
    arguments = {
        "tl.integrate": {"batch_key": "donor", "method": "train", **QUIET},
        "tl.map_reference": {"reference": make_data(), "labels_key": "type"},
    }.get(name, {})
    adata = make_data()
    before = parts_of(adata)
    result = function(adata, model=models[name], copy=True, **arguments)
    assert parts_of(adata) == before
    assert set(parts_of(result)) - set(before) == CALLS[name][1]


def test_every_function_of_adatas_is_in_the_table():
    functions = {
        f"{module.__name__.removeprefix('scfm.')}.{name}"
        for module in (scfm.pl, scfm.pp, scfm.tl)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    assert functions | {"encoding.make_encoding"} == set(CALLS) | NO_INPUT
