"""Small models with random weights: the four published families, and every way that our own presets differ."""

import numpy as np
import pytest
import torch

import scfm
from scfm.families import choose_preset

WIDTHS = {"d_model": 32, "n_heads": 4, "n_layers": 3, "d_ff": 48, "dropout": 0.0}
LINEAR = {"attention": {"kind": "linear", "n_random_features": 24}}
DECODER = {
    "n_layers": 1,
    "d_model": 16,
    "n_heads": 2,
    "d_ff": 64,
    "attention": {**LINEAR["attention"], "head_width": 8, "qkv_bias": False},
}
# Name of the preset, and what is changed in it besides the widths.
KINDS = {
    "geneformer v1": ("geneformer-v1-10m", {}),
    "geneformer v2": ("geneformer-v2-104m", {}),
    "scgpt": ("scgpt-human", {}),
    "scgpt, batch norm": ("scgpt-human", {"embedding": {"batch_norm": "shared"}}),
    "scbert": ("scbert", {"attention": {"head_width": 8, "n_random_features": 24}}),
    "scfoundation": (
        "scfoundation",
        {"decoder": DECODER, "embedding": {"n_value_bins": 10}},
    ),
    "rank, mean": ("small-rank", {}),
    "rank, concat": ("small-rank", {"pooling": {"how": "concat"}}),
    "rank, linear attention": ("small-rank", LINEAR),
    "bin, cls": ("small-bin", {}),
    "bin, linear attention": ("small-bin", LINEAR),
}
N_GENES, N_CELLS, N_CLASSES = 60, 40, 3


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def every_kind():
    return list(KINDS)


@pytest.fixture(scope="session")
def cells_and_genes():
    """Forty cells of the three largest types by sixty genes, in which every cell has some."""
    adata = scfm.datasets.pbmc()
    counts = adata.obs["bulk_labels"].value_counts()
    adata = adata[adata.obs["bulk_labels"].isin(counts.index[:N_CLASSES]).to_numpy()]
    n_cells_G = np.asarray((adata.X > 0).sum(0)).ravel()
    adata = adata[:, np.sort(np.argsort(-n_cells_G, kind="stable")[:N_GENES])]
    adata = adata[np.linspace(0, adata.n_obs - 1, N_CELLS).astype(int)].copy()
    adata.obs["bulk_labels"] = adata.obs["bulk_labels"].astype(str)
    return adata


@pytest.fixture
def small_model(cells_and_genes):
    """Build a model of a kind, its biases and gains random too."""

    def build(kind, seed=0):
        name, changes = KINDS[kind]
        preset = choose_preset(name)
        settings = dict(preset.encoding)
        if settings.get("context_length"):
            settings["context_length"] = 64
        encoding = scfm.encoding.make_encoding(scfm.EncodingConfig(**settings), adata=cells_and_genes)
        n_tokens = len(encoding.vocabulary)
        sizes = WIDTHS | {"context_length": settings.get("context_length", n_tokens)} | changes
        torch.manual_seed(seed)
        config = preset.model_config(n_tokens=n_tokens, pad_id=encoding.vocabulary.pad_id, **sizes)
        network = scfm.models.CellTransformer.for_vocabulary(config, encoding.vocabulary)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        return scfm.Model(network, encoding, objective=preset.objective)

    return build
