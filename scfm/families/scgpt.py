"""scGPT: a directory with `args.json`, `vocab.json` and a state dict."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scfm.encoding import EncodingConfig, make_encoding
from scfm.errors import ModelFileError
from scfm.families._checkpoint import CheckpointFiles
from scfm.families.base import Family, Preset, add_family, merged, refuse_medians
from scfm.models.config import ModelConfig
from scfm.models.io.dictionaries import Source, find_vocabulary
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

NAME = "scgpt"
ENCODING = {"kind": "bin", "add_cls": True}
OBJECTIVES = {"masked": "masked_values", "generative": "generative"}
ARCHITECTURE: dict[str, Any] = {
    "norm": "post",
    "norm_eps": 1e-5,
    "activation": "relu",
    "dropout_in_feed_forward": True,
    "embedding": {"positions": "none", "values": "continuous", "gene_norm": True, "norm": False},
    "heads": {"genes": False, "values": "mlp", "values_from_cells": True},
    "pooling": {"how": "cls", "normalize": True},
}
WEIGHTS = ("best_model.pt", "model.pt")
FIRST_LAYER = "transformer_encoder.layers.0.self_attn"
# Published names of the stacked projection of queries, keys and values, and of the output projection.
QKV_LAYOUTS = ("Wqkv.", "_impl.Wqkv.", "in_proj_")
OUT_LAYOUTS = ("out_proj", "_impl.out_proj")


def recognize(files: CheckpointFiles) -> bool:
    """Whether this is a directory with scGPT's `args.json`."""
    return files.has("args.json")


def read(files: CheckpointFiles, *, vocabulary: Source | None, medians: Source | None, strict: bool) -> Model:
    """Read a directory with `args.json`, `vocab.json` and `best_model.pt`; see `scfm.load`."""
    refuse_medians(files, medians)
    path, arguments = files.path, files.json("args.json")
    tokens = find_vocabulary(path, vocabulary)
    weights = next((name for name in WEIGHTS if files.has(name)), None)
    if weights is None:
        raise ModelFileError(
            f"{path} has an args.json, but none of {', '.join(WEIGHTS)}. Copy the weights to this directory."
        )
    state = without_wrapper(files.torch(weights), str(path / weights))
    config = _model_config(arguments, tokens, state, path)
    layout = _layout(state)
    network, unused = build_network(
        config, tokens, state, published_names(config, *layout), source=str(path / weights), strict=strict
    )
    encoding = make_encoding(_encoding_config(arguments, config), vocabulary=tokens)
    checkpoint = Checkpoint(family=NAME, unused=unused, settings={"layout": list(layout), "arguments": arguments})
    objective = "generative" if config.heads.values_from_cells else "masked_values"
    return Model(network, encoding, labels=_labels(arguments, config), objective=objective, checkpoint=checkpoint)


def write(model: Model, path: Path) -> None:
    """Write a directory as scGPT does, with the names of attention weights that were read, or torch's `in_proj_*`."""
    config, published = model.network.config, model.checkpoint.settings if model.checkpoint else {}
    require(config, {**_FIXED, "d_head": config.d_model // config.n_heads}, "scGPT")
    if config.classes.n_classes and config.classes.kind != "mlp":
        raise ModelFileError(
            f"This model has a class head of kind {config.classes.kind!r}, which scGPT does not have. "
            "Convert a model that was fitted without labels, or one with an 'mlp' head."
        )
    layout = published.get("layout", ("in_proj_", "out_proj"))
    path.mkdir(parents=True, exist_ok=True)
    torch.save(read_network(model.network, published_names(config, *layout)), path / WEIGHTS[0])
    arguments = published.get("arguments", {}) | _arguments(model)
    (path / "args.json").write_text(json.dumps(arguments, indent=2))
    tokens = model.encoding.vocabulary.tokens
    (path / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))


_FIXED = {
    "norm": "post",
    "activation": "relu",
    "dropout_in_feed_forward": True,
    "final_norm": False,
    "decoder": None,
    "attention.kind": "softmax",
    "attention.qkv_bias": True,
    "embedding.positions": "none",
    "embedding.values": "continuous",
    "embedding.gene_norm": True,
    "embedding.norm": False,
    "heads.genes": False,
    "heads.values": "mlp",
}


def published_names(config: ModelConfig, qkv: str, out: str) -> list[WeightMapping]:
    """Return the mappings of the tensors of scGPT's `TransformerModel`, for given names of the attention weights."""
    listed = [
        weight("embedding.gene.weight", "encoder.embedding.weight"),
        *weight_and_bias("embedding.gene_norm", "encoder.enc_norm"),
        *(
            entry
            for part in ("linear1", "linear2", "norm")
            for entry in weight_and_bias(f"embedding.value.{part}", f"value_encoder.{part}")
        ),
    ]
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer_encoder.layers.{layer}"
        for part in ("weight", "bias"):
            listed.append(weight(f"{ours}.attention.qkv.{part}", f"{theirs}.self_attn.{qkv}{part}"))
        listed += weight_and_bias(f"{ours}.attention.out", f"{theirs}.self_attn.{out}")
        listed += weight_and_bias(f"{ours}.feed_forward.up", f"{theirs}.linear1")
        listed += weight_and_bias(f"{ours}.feed_forward.down", f"{theirs}.linear2")
        listed += weight_and_bias(f"{ours}.attention_norm", f"{theirs}.norm1")
        listed += weight_and_bias(f"{ours}.feed_forward_norm", f"{theirs}.norm2")
    if config.embedding.target_input == "flag":
        listed.append(weight("embedding.flag.weight", "flag_encoder.weight"))
    return listed + _batch_norm_weights(config) + _head_weights(config)


def _batch_norm_weights(config: ModelConfig) -> list[WeightMapping]:
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    if config.embedding.batch_norm == "shared":
        return [
            weight(f"embedding.batch_norm.norms.0.{name}", f"bn.{name}") for name in ["weight", "bias", *statistics]
        ]
    if config.embedding.batch_norm == "domain":
        return [
            weight(f"embedding.batch_norm.norms.{domain}.{name}", f"dsbn.bns.{domain}.{name}")
            for domain in range(config.n_batches)
            for name in statistics
        ]
    return []


def _head_weights(config: ModelConfig) -> list[WeightMapping]:
    listed: list[WeightMapping] = []
    for number, index in enumerate((0, 2, 4), start=1):
        listed += weight_and_bias(f"value_head.value.linear{number}", f"decoder.fc.{index}")
        listed += (
            weight_and_bias(f"value_head.nonzero.linear{number}", f"decoder.zero_logit.{index}")
            if config.heads.zeros
            else []
        )
    if config.heads.values_from_cells:
        listed += weight_and_bias("value_from_cell_head.query", "mvc_decoder.gene2query")
        listed.append(weight("value_from_cell_head.weight.weight", "mvc_decoder.W.weight"))
        listed += (
            weight_and_bias("value_from_cell_head.nonzero", "mvc_decoder.W_zero_logit") if config.heads.zeros else []
        )
    if config.heads.batch_labels:
        listed += weight_and_bias("batch_labels.norm", "batch_encoder.enc_norm")
        listed.append(weight("batch_labels.embedding.weight", "batch_encoder.embedding.weight"))
    for present, ours, theirs in (
        (config.classes.n_classes, "class_head", "cls_decoder"),
        (config.heads.batches, "batch_head", "grad_reverse_discriminator"),
    ):
        if present:
            for number in range(config.classes.n_layers - 1):  # linear, activation, norm; the activation has no tensor
                listed += weight_and_bias(f"{ours}.layers.{3 * number}", f"{theirs}._decoder.{3 * number}")
                listed += weight_and_bias(f"{ours}.layers.{3 * number + 2}", f"{theirs}._decoder.{3 * number + 2}")
            listed += weight_and_bias(f"{ours}.linear", f"{theirs}.out_layer")
    return listed


def _layout(state: State) -> tuple[str, str]:
    """Return the names of the attention weights; those of the newest torch if none are found."""
    qkv = next((name for name in QKV_LAYOUTS if f"{FIRST_LAYER}.{name}weight" in state), "in_proj_")
    out = next((name for name in OUT_LAYOUTS if f"{FIRST_LAYER}.{name}.weight" in state), "out_proj")
    return qkv, out


def _model_config(arguments: Mapping[str, Any], vocabulary: Vocabulary, state: State, path: Path) -> ModelConfig:
    if arguments.get("input_emb_style", "continuous") != "continuous":
        raise ModelFileError(
            f"{path}: args.json has input_emb_style {arguments['input_emb_style']!r}; only 'continuous' is supported."
        )
    domains = sum(bool(re.fullmatch(r"dsbn\.bns\.\d+\.running_mean", name)) for name in state)
    batches = next((state[name].shape[0] for name in _BATCH_TENSORS if name in state), domains)
    classes = state.get("cls_decoder.out_layer.weight")
    try:
        return ModelConfig.from_dict(
            merged(
                ARCHITECTURE,
                {
                    "n_tokens": len(vocabulary),
                    "pad_id": vocabulary.pad_id,
                    "context_length": arguments["max_seq_len"],
                    "d_model": arguments["embsize"],
                    "n_heads": arguments["nheads"],
                    "n_layers": arguments["nlayers"],
                    "d_ff": arguments["d_hid"],
                    "dropout": arguments["dropout"],
                    "n_batches": batches,
                    "embedding": {
                        "target_input": "flag" if "flag_encoder.weight" in state else "value",
                        "batch_norm": "domain" if domains else "shared" if "bn.running_mean" in state else "none",
                    },
                    "heads": {
                        "zeros": "decoder.zero_logit.0.weight" in state,
                        "values_from_cells": "mvc_decoder.gene2query.weight" in state,
                        "batch_labels": _BATCH_TENSORS[0] in state,
                        "batches": _BATCH_TENSORS[1] in state,
                    },
                    "classes": {
                        "kind": "batch_norm" if classes is None else "mlp",
                        "n_classes": 0 if classes is None else classes.shape[0],
                        "n_layers": arguments.get("n_layers_cls", 3),
                    },
                },
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: args.json does not describe an scGPT network ({error!r}).") from error


_BATCH_TENSORS = ("batch_encoder.embedding.weight", "grad_reverse_discriminator.out_layer.weight")


def _encoding_config(arguments: Mapping[str, Any], config: ModelConfig) -> EncodingConfig:
    return EncodingConfig(
        kind="bin",
        context_length=config.context_length,
        add_cls=True,
        n_bins=arguments.get("n_bins", 51),
        cls_value=float(arguments.get("pad_value", -2)),
    )


def _labels(arguments: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """Return names of the classes; none for the pretrained decoder of one class. Published files do not contain names."""
    if config.classes.n_classes < 2:
        return ()
    return tuple(arguments.get("labels") or map(str, range(config.classes.n_classes)))


def _arguments(model: Model) -> dict[str, Any]:
    config, encoding = model.network.config, model.encoding.config
    return {
        "embsize": config.d_model,
        "nheads": config.n_heads,
        "d_hid": config.d_ff,
        "nlayers": config.n_layers,
        "n_layers_cls": config.classes.n_layers,
        "dropout": config.dropout,
        "n_bins": encoding.n_bins,
        "input_emb_style": "continuous",
        "max_seq_len": config.context_length,
        "pad_token": model.encoding.vocabulary.special.get("pad", "<pad>"),
        "pad_value": int(encoding.cls_value),
        "mask_value": -1,
        **({"labels": list(model.labels)} if model.labels else {}),
    }


add_family(
    Family(
        name=NAME,
        layout="an scGPT directory (args.json)",
        encoding=ENCODING,
        architecture=ARCHITECTURE,
        presets=(
            Preset(
                name="scgpt-human",
                family=NAME,
                encoding={**ENCODING, "context_length": 1200, "n_bins": 51},
                network={
                    **ARCHITECTURE,
                    "n_layers": 12,
                    "d_model": 512,
                    "n_heads": 8,
                    "d_ff": 512,
                    "context_length": 1200,
                    "dropout": 0.2,
                    "embedding": {**ARCHITECTURE["embedding"], "target_input": "flag"},
                },
                objective="generative",
                objectives=OBJECTIVES,
                n_tokens=60_697,
                pad_id=60_694,
                source="Cui et al. 2024",
            ),
        ),
        objectives=OBJECTIVES,
        files=("args.json", "vocab.json", *WEIGHTS),
        recognize=recognize,
        read=read,
        write=write,
    )
)
