"""A family of models in one file: an encoding, a pretraining objective, an architecture, a preset and a file format.

Each cell is the set of its expressed genes. The checkpoint is a JSON file with the names of the genes and their vectors.
"""

import json
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch.nn import functional as F

import scfm
from scfm.encoding.base import Encoding, add_special_tokens
from scfm.encoding.ragged import expressed
from scfm.families import FAMILIES, Family, Preset
from scfm.models import CellTransformer, Model
from scfm.models.state import Checkpoint
from scfm.objectives import OBJECTIVES, PretrainingObjective, Term


class SetEncoding(Encoding):
    kind = "toy_set"
    has_values = False
    defaults = MappingProxyType(
        {"context_length": 64, "add_cls": False, "add_eos": False, "depth_over": "matrix", "log1p": False, "include_zeros": False}
    )  # fmt: skip

    def _encode_numpy(self, block, genes, depth_B, draw):
        cells = expressed(block, genes)
        return add_special_tokens(cells.cu_seqlens, cells.token_T, None, front={}, back={})


@dataclass(frozen=True)
class SmallStates:
    """Draws the states of all tokens to zero: no science, but a loss that falls."""

    name: str = "toy_small_states"

    def corrupt(self, cells, generator):
        return cells, {"n_T": torch.ones(cells.n_tokens)}

    def loss(self, network, inputs, targets):
        state_TD = network(inputs)
        return {"size": Term(F.mse_loss(state_TD, torch.zeros_like(state_TD), reduction="sum"), targets["n_T"].sum())}


OBJECTIVES.add("toy_small_states", PretrainingObjective(make=lambda network, encoding: SmallStates()))
ARCHITECTURE = {"norm": "pre", "embedding": {"positions": "none", "norm": False}, "heads": {"genes": False}}
PRESET = Preset(
    name="toy-tiny",
    family="toy",
    encoding={"kind": "toy_set"},
    network={**ARCHITECTURE, "d_model": 8, "n_heads": 2, "n_layers": 1, "d_ff": 8, "context_length": 64},
    objective="toy_small_states",
    objectives={"masked": "toy_small_states"},
)


def build(genes):
    vocabulary = scfm.Vocabulary.from_genes(genes, special=("pad",))
    encoding = scfm.encoding.make_encoding("toy_set", vocabulary=vocabulary)
    torch.manual_seed(0)
    network = CellTransformer.for_vocabulary(PRESET.model_config(n_tokens=len(vocabulary)), vocabulary)
    return Model(network, encoding, objective=PRESET.objective, checkpoint=Checkpoint(family="toy"))


def read(files, *, vocabulary, medians, strict):
    content = files.json("toy.json")
    model = build(content["genes"])
    with torch.no_grad():
        model.network.embedding.gene.weight[1:] = torch.tensor(content["vectors"])
    return model


def write(model, path):
    path.mkdir()
    vectors = model.network.embedding.gene.weight[1:].detach().numpy().astype(np.float64).tolist()
    (path / "toy.json").write_text(json.dumps({"genes": list(model.encoding.vocabulary.genes), "vectors": vectors}))


FAMILY = FAMILIES.add(
    "toy",
    Family(
        name="toy",
        layout="a toy directory (toy.json)",
        encoding={"kind": "toy_set"},
        architecture=ARCHITECTURE,
        presets=(PRESET,),
        objectives=PRESET.objectives,
        files=("toy.json",),
        recognize=lambda files: files.has("toy.json"),
        read=read,
        write=write,
    ),
)
