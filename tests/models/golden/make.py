"""Writes `format_1` beside this file. Run once, when the format version rises; never for a version that was released."""

from pathlib import Path

import numpy as np
import torch

from scfm.encoding import EncodingConfig, Vocabulary, make_encoding
from scfm.models import CellTransformer, Model, ModelConfig

torch.manual_seed(0)
vocabulary = Vocabulary.from_genes([f"GENE{place}" for place in range(40)], special=("pad", "mask"))
encoding = make_encoding(
    EncodingConfig(kind="rank", context_length=64), vocabulary=vocabulary, medians=np.linspace(0.5, 3, len(vocabulary))
)
config = ModelConfig(
    n_tokens=len(vocabulary), context_length=64, d_model=16, n_heads=2, n_layers=2, d_ff=24, n_classes=2
)
network = CellTransformer.for_vocabulary(config, vocabulary)
model = Model(network, encoding, labels=("A", "B"), history={"preset": "golden"})
model.save(Path(__file__).with_name("format_1"))
