"""Writes the golden model of the current format version into a new folder next to this file.

Run once when the format version rises, never for a version that was released: `python tests/models/golden/make.py`.
`format_1` was written by the version of this script that scfm had then. The network is the same in all: two layers with
random weights, two classes. Format 2 adds a gene classifier, calibration, scores, aliases and directions of the screen; format 3
adds Gaussians of the classes; format 4 standardizes their distances for each class.
"""

from pathlib import Path

import numpy as np
import torch

from scfm.encoding import EncodingConfig, Vocabulary, make_encoding
from scfm.models import CellTransformer, Model, ModelConfig
from scfm.models.io.layout import FORMAT_VERSION
from scfm.models.state import Calibration
from scfm.nn import ClassHeadConfig

torch.manual_seed(0)
genes = Vocabulary.from_genes([f"GENE{index}" for index in range(40)], special=("pad", "mask"))
vocabulary = Vocabulary(genes.tokens, special=genes.special, aliases={"OLD0": "GENE0"})
encoding = make_encoding(
    EncodingConfig(kind="rank", context_length=64), vocabulary=vocabulary, medians=np.linspace(0.5, 3, len(vocabulary))
)
config = ModelConfig(
    n_tokens=len(vocabulary),
    context_length=64,
    d_model=16,
    n_heads=2,
    n_layers=2,
    d_ff=24,
    classes=ClassHeadConfig(n_classes=2),
)
network = CellTransformer.for_vocabulary(config, vocabulary)
network.add_gene_classifier()
network.gene_classifier.weight_VC.copy_(torch.linspace(-1, 1, 84).view(42, 2))
network.gene_classifier.ensemble_weights.copy_(torch.tensor([2.0, 0.5]))
network.add_novelty(2)
network.novelty.loading_VR.copy_(torch.linspace(-1, 1, 84).view(42, 2))
network.novelty.weight_V.fill_(0.5)
network.novelty.component_location_C.copy_(torch.tensor([0.1, 0.3]))
network.novelty.component_scale_C.copy_(torch.tensor([1.0, 3.0]))
network.novelty.gene_location_C.fill_(0.2)
network.novelty.gene_scale_C.fill_(2.0)
model = Model(
    network,
    encoding,
    labels=("A", "B"),
    calibration=Calibration(n_cells=20, transformer_temperature=0.5, ensemble_temperature=2.0, novelty_threshold=1.5),
    scores=[{"method": "scfm", "accuracy": 0.75, "macro_f1": 0.5}],
    objective="masked_genes",
    history={"preset": "golden"},
)
model.save(Path(__file__).with_name(f"format_{FORMAT_VERSION}"))
