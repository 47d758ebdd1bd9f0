"""A family in one file: one small preset, and checkpoints that are directories with a `toy.json`."""

import json

import torch

from scfm.encoding import EncodingConfig, make_encoding
from scfm.families import Family, Preset, add_family
from scfm.models.io.tensors import WeightMapping, build_network, read_network
from scfm.models.model import Model
from scfm.models.state import Checkpoint
from scfm.vocab import Vocabulary

NAME = "toy"
ENCODING = {"kind": "toy_bits"}
OBJECTIVES = {"masked": "toy_half_hidden"}
ARCHITECTURE = {
    "embedding": {"positions": "none", "values": "continuous"},
    "heads": {"genes": False, "values": "mlp"},
    "pooling": {"how": "cls"},
}
PRESET = Preset(
    name="toy-tiny",
    family=NAME,
    encoding=ENCODING,
    network={**ARCHITECTURE, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "context_length": 128},
    objective="toy_half_hidden",
    objectives=OBJECTIVES,
)


def published_names(names):
    """Every tensor of the checkpoint has scfm's name with "toy." before it."""
    return [WeightMapping(name, (f"toy.{name}",)) for name in names]


def recognize(files):
    return files.has("toy.json")


def read(files, *, vocabulary, medians, strict):
    tokens = Vocabulary.from_dict(files.json("toy.json"))
    config, state = PRESET.model_config(n_tokens=len(tokens), pad_id=tokens.pad_id), files.torch("toy.pt")
    names = [name.removeprefix("toy.") for name in state]
    network, unused = build_network(config, tokens, state, published_names(names), source=str(files), strict=strict)
    encoding = make_encoding(EncodingConfig(**ENCODING), vocabulary=tokens)
    return Model(network, encoding, checkpoint=Checkpoint(family=NAME, unused=unused))


def write(model, path):
    path.mkdir(parents=True)
    (path / "toy.json").write_text(json.dumps(model.encoding.vocabulary.to_dict()))
    torch.save(read_network(model.network, published_names(model.network.state_dict())), path / "toy.pt")


add_family(
    Family(
        name=NAME,
        layout="a toy directory (toy.json)",
        files=("toy.json", "toy.pt"),
        encoding=ENCODING,
        architecture=ARCHITECTURE,
        presets=(PRESET,),
        objectives=OBJECTIVES,
        recognize=recognize,
        read=read,
        write=write,
    )
)
