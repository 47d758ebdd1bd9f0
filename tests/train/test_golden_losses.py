"""Twenty stored losses of each objective on the embedded data: a change that moves them must say so.

To store new ones after a change that is meant to move them: `python tests/train/test_golden_losses.py`, and say why in the commit.
"""

import json
from pathlib import Path

import pytest

import scfm
from scfm import pp
from scfm.encoding import EncodingConfig, make_encoding
from scfm.families import geneformer, scgpt
from scfm.models import CellTransformer, ModelConfig
from scfm.objectives import Classification, Generative, MaskedGenes, MaskedValues
from scfm.train import FitConfig, train

GOLDEN = Path(__file__).with_name("golden_losses.json")
OBJECTIVES = ("masked_genes", "masked_values", "generative", "classification")
CONFIG = FitConfig(n_steps=20, tokens_per_step=1500, accelerator="cpu")


def twenty_losses(name: str) -> list[float]:
    import torch

    kind = "bin" if name in ("masked_values", "generative") else "rank"
    adata = scfm.datasets.pbmc()[::7].copy()
    encoding = make_encoding(EncodingConfig(kind=kind, context_length=128), adata=adata)
    labels = torch.from_numpy(adata.obs["bulk_labels"].cat.codes.to_numpy().astype("int64"))
    cells = pp.encode(adata, encoding).replace(labels_B=labels)
    torch.manual_seed(0)
    vocabulary = encoding.vocabulary
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "d_ff": 64, "context_length": 128, "dropout": 0.1}
    tokens = {"n_tokens": len(vocabulary), "pad_id": vocabulary.pad_id, "classes": {"n_classes": 10}}
    family = scgpt if kind == "bin" else geneformer
    config = ModelConfig.from_dict(family.ARCHITECTURE | sizes | tokens)
    network = CellTransformer.for_vocabulary(config, vocabulary)
    objective = {
        "masked_genes": MaskedGenes(mask_id=vocabulary.mask_id, is_gene_V=network.is_gene_V),
        "masked_values": MaskedValues(is_gene_V=network.is_gene_V),
        "generative": Generative(is_gene_V=network.is_gene_V, second_pass_from=15),
        "classification": Classification(),
    }[name]
    module = train(network, objective, cells, CONFIG, title=name, progress=False)
    return [float(loss) for loss in module.losses]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_the_stored_ones(name):
    # Other machines sum in other orders; over twenty steps that grows to less than this.
    assert twenty_losses(name) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=2e-3)


if __name__ == "__main__":
    losses = {name: [round(loss, 6) for loss in twenty_losses(name)] for name in OBJECTIVES}
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
