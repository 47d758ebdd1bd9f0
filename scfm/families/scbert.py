"""scBERT: a file with a dictionary that contains `model_state_dict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scfm.encoding import EncodingConfig, make_encoding
from scfm.errors import ModelFileError
from scfm.families._checkpoint import CheckpointFiles
from scfm.families._performer import block_weights, counter_name, registered_twice
from scfm.families.base import Family, Preset, add_family, merged, refuse_medians
from scfm.models.config import ModelConfig
from scfm.models.io.dictionaries import VOCABULARY_FILES, Source, find_vocabulary
from scfm.models.io.tensors import (
    State,
    WeightMapping,
    build_network,
    read_network,
    require,
    weight,
    weight_and_bias,
    without_wrapper,
)
from scfm.models.model import Model
from scfm.models.state import Checkpoint
from scfm.vocab import Vocabulary

NAME = "scbert"
ENCODING = {"kind": "bucket"}
OBJECTIVES = {"masked": "masked_buckets"}
ARCHITECTURE: dict[str, Any] = {
    "norm": "pre",
    "norm_eps": 1e-5,
    "final_norm": True,
    "activation": "gelu",
    "dropout": 0.0,
    "attention": {"kind": "linear", "qkv_bias": False},
    "embedding": {"positions": "none", "values": "bucket", "n_value_bins": 7, "norm": False, "train_genes": False},
    "heads": {"genes": False, "values": "bucket"},
    "pooling": {"how": "mean"},
}
STATE = "model_state_dict"
PROJECTION = "performer.net.layers.0.0.fn.fast_attention.projection_matrix"


def recognize(files: CheckpointFiles) -> bool:
    """Whether this is a file with a dictionary that contains `model_state_dict`."""
    return isinstance(files.content.get(STATE), dict)


def read(files: CheckpointFiles, *, vocabulary: Source | None, medians: Source | None, strict: bool) -> Model:
    """Read a `.pth` file of a pretrained (`to_out` over buckets) or fine-tuned (convolution head) model; see `scfm.load`."""
    refuse_medians(files, medians)
    path, state = files.path, without_wrapper(files.content[STATE], str(files))
    tokens = panel_vocabulary(find_vocabulary(path, vocabulary))
    config = _model_config(state, tokens, path)
    counter = counter_name(state, "performer")
    network, unused = build_network(
        config,
        tokens,
        state,
        published_names(config, counter),
        source=str(path),
        unused=registered_twice(state, "performer", str(path)),
        strict=strict,
    )
    encoding = make_encoding(EncodingConfig(kind="bucket", n_bins=config.embedding.n_value_bins - 1), vocabulary=tokens)
    checkpoint = Checkpoint(family=NAME, unused=unused, settings={"counter": counter})
    labels = tuple(map(str, range(config.classes.n_classes)))
    objective = None if config.heads.values == "none" else "masked_buckets"
    return Model(network, encoding, labels=labels, objective=objective, checkpoint=checkpoint)


def write(model: Model, path: Path) -> None:
    """Write `{"model_state_dict": ...}` with the names of the file that was read; it does not contain gene names."""
    config, checkpoint = model.network.config, model.checkpoint or Checkpoint(family=NAME)
    require(config, _FIXED, "scBERT")
    if config.classes.n_classes and config.classes.kind != "panel":
        raise ModelFileError(
            f"This model has a class head of kind {config.classes.kind!r}, but scBERT needs 'panel'. Convert a model that was "
            "fitted without labels, or one with a 'panel' head."
        )
    state = read_network(
        model.network, published_names(config, checkpoint.settings.get("counter", counter_name({}, "performer")))
    )
    for copy, reason in checkpoint.unused.items():
        if reason.startswith("a copy of "):
            state[copy] = state[reason.removeprefix("a copy of ")]
    torch.save({STATE: state}, path)


_FIXED = {
    "norm": "pre",
    "norm_eps": 1e-5,
    "final_norm": True,
    "activation": "gelu",
    "attention.kind": "linear",
    "attention.qkv_bias": False,
    "embedding.positions": "none",
    "embedding.values": "bucket",
    "embedding.norm": False,
    "heads.genes": False,
}


def published_names(config: ModelConfig, counter: str) -> list[WeightMapping]:
    """Return the mappings of the tensors of scBERT's `PerformerLM`."""
    listed = [
        weight("embedding.gene.weight", "pos_emb.emb.weight"),
        weight("embedding.value.weight", "token_emb.weight"),
        *block_weights(config.n_layers, "blocks", "performer"),
        *weight_and_bias("norm", "norm"),
        weight("calls_since_redraw", counter),
    ]
    if config.heads.values == "bucket":
        listed += weight_and_bias("value_head.bucket", "to_out")
    if config.classes.n_classes:
        listed += weight_and_bias("class_head.convolution", "to_out.conv1")
        for number in (1, 2, 3):
            listed += weight_and_bias(f"class_head.linear{number}", f"to_out.fc{number}")
    return listed


def panel_vocabulary(vocabulary: Vocabulary) -> Vocabulary:
    """Return a vocabulary of the genes in their order, and of the last position as the token of role "eos"."""
    if vocabulary.eos_id is not None:
        return vocabulary
    return Vocabulary([*vocabulary.genes, "<eos>"], special={"eos": "<eos>"}, id_type=vocabulary.id_type)


def _model_config(state: State, vocabulary: Vocabulary, path: Path) -> ModelConfig:
    try:
        n_positions, d_model = state["pos_emb.emb.weight"].shape
        n_features, head_width = state[PROJECTION].shape
        width = state["performer.net.layers.0.0.fn.to_q.weight"].shape[0]
        d_ff, n_buckets = state["performer.net.layers.0.1.fn.fn.w1.weight"].shape[0], state["token_emb.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelFileError(
            f"{path} is not an scBERT checkpoint: {error} is missing from {STATE!r}, or has another number of axes."
        ) from error
    if n_positions != len(vocabulary):
        raise ModelFileError(
            f"{path} has {n_positions} positions, but the vocabulary has {len(vocabulary)} tokens (including the last, which is "
            "not a gene). Pass the genes in the order of the training data as `vocabulary=`."
        )
    n_layers = sum(name.startswith("performer.net.layers.") and name.endswith(".fn.to_q.weight") for name in state)
    classes = state.get("to_out.fc3.weight")
    return ModelConfig.from_dict(
        merged(
            ARCHITECTURE,
            {
                "n_tokens": n_positions,
                "pad_id": None,
                "context_length": n_positions,
                "d_model": d_model,
                "n_heads": width // head_width,
                "n_layers": n_layers,
                "d_ff": d_ff,
                "attention": {"head_width": head_width, "n_random_features": n_features},
                "embedding": {"n_value_bins": n_buckets},
                "heads": {"values": "bucket" if classes is None else "none"},
                "classes": {
                    "kind": "batch_norm" if classes is None else "panel",
                    "n_classes": 0 if classes is None else classes.shape[0],
                },
            },
        )
    )


add_family(
    Family(
        name=NAME,
        layout="an scBERT file (a dictionary with 'model_state_dict')",
        encoding=ENCODING,
        architecture=ARCHITECTURE,
        presets=(
            Preset(
                name="scbert",
                family=NAME,
                encoding=ENCODING,
                network={
                    **ARCHITECTURE,
                    "n_layers": 6,
                    "d_model": 200,
                    "n_heads": 10,
                    "attention": {**ARCHITECTURE["attention"], "head_width": 64},
                    "d_ff": 800,
                    "context_length": 16_907,
                },
                objective="masked_buckets",
                objectives=OBJECTIVES,
                n_tokens=16_907,
                pad_id=None,
                source="Yang et al. 2022",
            ),
        ),
        objectives=OBJECTIVES,
        files=("*.pth", "*.pt", "*.ckpt", *VOCABULARY_FILES),
        recognize=recognize,
        read=read,
        write=write,
    )
)
