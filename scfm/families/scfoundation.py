"""scFoundation: a file that contains several models with their configurations."""

from __future__ import annotations

from collections.abc import Mapping
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
from scfm.nn.config import DecoderConfig
from scfm.vocab import Vocabulary

NAME = "scfoundation"
ENCODING = {"kind": "continuous"}
OBJECTIVES = {"masked": "read_depth"}
ARCHITECTURE: dict[str, Any] = {
    "norm": "post",
    "norm_eps": 1e-5,
    "final_norm": True,
    "activation": "relu",
    "dropout": 0.1,
    "dropout_in_feed_forward": True,
    "embedding": {"positions": "none", "values": "soft_bins", "n_value_bins": 100, "norm": False},
    "heads": {"genes": False, "values": "linear"},
    "pooling": {"how": "concat"},
}
PARTS = ("cell", "rde", "gene")  # in the order of preference; published embeddings are from the first
PREFIX = "model."
PERFORMER = "decoder.performer"


def recognize(files: CheckpointFiles) -> bool:
    """Whether this is a file with a `cell`, `rde` or `gene` model."""
    return any(_is_part(files.content.get(part)) for part in PARTS)


def read(files: CheckpointFiles, *, vocabulary: Source | None, medians: Source | None, strict: bool) -> Model:
    """Read the `cell` model of the file, or, without one, the first of `rde` and `gene`; see `scfm.load`."""
    refuse_medians(files, medians)
    path, content = files.path, files.content
    part = next(part for part in PARTS if _is_part(content.get(part)))
    settings, source = content[part]["config"], f"{path} [{part!r}]"
    published_state = without_wrapper(content[part]["state_dict"], source)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in published_state.items()}
    tokens = find_vocabulary(path, vocabulary, add_special=_missing_specials(vocabulary))
    config = _model_config(settings, state, tokens, source)
    counter = counter_name(state, PERFORMER)
    unused = registered_twice(state, PERFORMER, source)
    if counter not in state:  # versions that never resample have no counter
        state[counter] = torch.tensor(0)
    network, unused = build_network(
        config, tokens, state, published_names(config, counter), source=source, unused=unused, strict=strict
    )
    encoding = make_encoding(EncodingConfig(kind="continuous"), vocabulary=tokens)
    stored = f"{PREFIX}{counter}" in published_state
    published = {"part": part, "config": settings, "counter": counter if stored else None}
    checkpoint = Checkpoint(family=NAME, unused=unused, settings=published)
    return Model(network, encoding, objective="read_depth", checkpoint=checkpoint)


def write(model: Model, path: Path) -> None:
    """Write the model as the part that it was read from ("cell" for models of scfm)."""
    config, checkpoint = model.network.config, model.checkpoint or Checkpoint(family=NAME)
    published = checkpoint.settings
    require(config, _FIXED, "scFoundation")
    if config.classes.n_classes:
        raise ModelFileError("scFoundation has no class head. Convert a model that was fitted without labels.")
    counter = published.get("counter", counter_name({}, PERFORMER))
    state = read_network(model.network, published_names(config, counter or "counter"))
    state.pop("counter", None)
    for copy, reason in checkpoint.unused.items():
        if reason.startswith("a copy of "):
            state[copy] = state[reason.removeprefix("a copy of ")]
    named = {PREFIX + name: tensor for name, tensor in state.items()}
    settings = published.get("config") or _settings(config)
    torch.save({published.get("part", PARTS[0]): {"state_dict": named, "config": settings}}, path)


_FIXED = {
    "norm": "post",
    "norm_eps": 1e-5,
    "final_norm": True,
    "activation": "relu",
    "dropout_in_feed_forward": True,
    "embedding.positions": "none",
    "embedding.values": "soft_bins",
    "embedding.norm": False,
    "heads.genes": False,
    "heads.values": "linear",
}


def published_names(config: ModelConfig, counter: str) -> list[WeightMapping]:
    """Return the mappings of the tensors of scFoundation's `MaeAutobin`, without the prefix "model."."""
    listed = [
        weight("embedding.gene.weight", "pos_emb.weight"),
        *weight_and_bias("embedding.value.linear1", "token_emb.mlp"),
        *weight_and_bias("embedding.value.linear2", "token_emb.mlp2"),
        weight("embedding.value.bins.weight", "token_emb.emb.weight"),
        weight("embedding.value.mask.weight", "token_emb.emb_mask.weight"),
        weight("embedding.value.pad.weight", "token_emb.emb_pad.weight"),
    ]
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"encoder.transformer_encoder.{layer}"
        for part in ("weight", "bias"):
            listed.append(weight(f"{ours}.attention.qkv.{part}", f"{theirs}.self_attn.in_proj_{part}"))
        listed += weight_and_bias(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        listed += weight_and_bias(f"{ours}.feed_forward.up", f"{theirs}.linear1")
        listed += weight_and_bias(f"{ours}.feed_forward.down", f"{theirs}.linear2")
        listed += weight_and_bias(f"{ours}.attention_norm", f"{theirs}.norm1")
        listed += weight_and_bias(f"{ours}.feed_forward_norm", f"{theirs}.norm2")
    return [
        *listed,
        *weight_and_bias("norm", "encoder.norm"),
        *weight_and_bias("decoder.project", "decoder_embed"),
        *block_weights(config.decoder.n_layers if config.decoder else 0, "decoder.blocks", PERFORMER),
        *weight_and_bias("decoder.inner_norm", "decoder.norm"),
        *weight_and_bias("decoder.norm", "norm"),
        *weight_and_bias("value_head.value", "to_final"),
        weight("calls_since_redraw", counter),
    ]


def _is_part(content: object) -> bool:
    return isinstance(content, dict) and {"state_dict", "config"} <= set(content)


def _missing_specials(vocabulary: Source | None) -> tuple[str, ...]:
    return () if isinstance(vocabulary, Vocabulary) else ("target_depth", "source_depth", "pad")


def _model_config(settings: Mapping[str, Any], state: State, vocabulary: Vocabulary, source: str) -> ModelConfig:
    try:
        network = settings["model_config"]["mae_autobin"]
        encoder, decoder = network["encoder"], network["decoder"]
        n_positions = settings["dataset_config"]["rnaseq"]["seq_len"] + 1
        projection = state[f"{PERFORMER}.net.layers.0.0.fn.fast_attention.projection_matrix"]
        if n_positions != len(vocabulary):
            raise ModelFileError(
                f"{source} has {n_positions} positions (including two read depths and padding), but the vocabulary has "
                f"{len(vocabulary)} tokens. Pass the published list of 19,264 genes as `vocabulary=`."
            )
        return ModelConfig.from_dict(
            merged(
                ARCHITECTURE,
                {
                    "n_tokens": n_positions,
                    "pad_id": None,
                    "context_length": n_positions - 1,
                    "d_model": encoder["hidden_dim"],
                    "n_layers": encoder["depth"],
                    "n_heads": encoder["heads"],
                    "d_ff": 4 * encoder["hidden_dim"],
                    "embedding": {"n_value_bins": network["bin_num"], "bin_alpha": float(network["bin_alpha"])},
                    "decoder": {
                        "n_layers": decoder["depth"],
                        "d_model": decoder["hidden_dim"],
                        "n_heads": decoder["heads"],
                        "d_ff": 4 * decoder["hidden_dim"],
                        "attention": {
                            "kind": "linear",
                            "qkv_bias": False,
                            "head_width": decoder["dim_head"],
                            "n_random_features": projection.shape[0],
                        },
                    },
                },
            )
        )
    except ModelFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{source} has no configuration of an scFoundation network ({error!r}).") from error


def _settings(config: ModelConfig) -> dict[str, Any]:
    decoder = config.decoder or DecoderConfig()
    return {
        "model_config": {
            "mae_autobin": {
                "encoder": {
                    "module_type": "transformer",
                    "hidden_dim": config.d_model,
                    "depth": config.n_layers,
                    "heads": config.n_heads,
                    "dim_head": config.d_head,
                },
                "decoder": {
                    "module_type": "performer",
                    "hidden_dim": decoder.d_model,
                    "depth": decoder.n_layers,
                    "heads": decoder.n_heads,
                    "dim_head": decoder.d_head,
                },
                "n_class": 1,
                "bin_num": config.embedding.n_value_bins,
                "bin_alpha": config.embedding.bin_alpha,
            }
        },
        "dataset_config": {"rnaseq": {"seq_len": config.n_tokens - 1, "pad_token_id": 103, "mask_token_id": 102}},
    }


add_family(
    Family(
        name=NAME,
        layout="an scFoundation file (a dictionary with 'cell', 'rde' or 'gene')",
        encoding=ENCODING,
        architecture=ARCHITECTURE,
        presets=(
            Preset(
                name="scfoundation",
                family=NAME,
                encoding=ENCODING,
                network={
                    **ARCHITECTURE,
                    "n_layers": 12,
                    "d_model": 768,
                    "n_heads": 12,
                    "d_ff": 3072,
                    "decoder": {},
                    "context_length": 19_266,
                },
                objective="read_depth",
                objectives=OBJECTIVES,
                n_tokens=19_267,
                pad_id=None,
                source="Hao et al. 2024",
            ),
        ),
        objectives=OBJECTIVES,
        files=("*.ckpt", "*.pt", *VOCABULARY_FILES),
        recognize=recognize,
        read=read,
        write=write,
    )
)
