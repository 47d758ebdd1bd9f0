"""Geneformer: a Hugging Face directory of a BERT (V1 and V2; pretrained model, cell classifier or gene classifier)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scfm.encoding import EncodingConfig, make_encoding
from scfm.errors import ModelFileError
from scfm.families._checkpoint import CheckpointFiles
from scfm.families.base import Family, Preset, add_family, merged
from scfm.models.config import ModelConfig
from scfm.models.io.dictionaries import SHARED_FOLDERS, Source, find_medians, find_vocabulary, write_dictionaries
from scfm.models.io.load import read_weights
from scfm.models.io.tensors import (
    State,
    WeightMapping,
    build_network,
    read_network,
    require,
    tied,
    weight,
    weight_and_bias,
    without_wrapper,
)
from scfm.models.model import Model
from scfm.models.state import Checkpoint
from scfm.vocab import Vocabulary

NAME = "geneformer"
# The dictionaries of all models are in separate folders of the repository.
SHARED_FOLDERS.extend(["geneformer", "geneformer/gene_dictionaries_30m"])
ENCODING = {"kind": "rank"}
OBJECTIVES = {"masked": "masked_genes"}
ARCHITECTURE: dict[str, Any] = {
    "norm": "post",
    "norm_eps": 1e-12,
    "activation": "relu",
    "embedding": {"positions": "rank", "values": "none", "norm": True},
    "heads": {"genes": True},
    "pooling": {"how": "mean"},
}
WORDS = "bert.embeddings.word_embeddings.weight"
BERT_CLASSES: dict[str, str] = {
    "BertForSequenceClassification": "pooler",
    "BertForTokenClassification": "token",
}


def recognize(files: CheckpointFiles) -> bool:
    """Whether this is a Hugging Face directory of a BERT."""
    return files.has("config.json") and files.json("config.json").get("model_type") == "bert"


def read(files: CheckpointFiles, *, vocabulary: Source | None, medians: Source | None, strict: bool) -> Model:
    """Read a directory with `config.json` and `model.safetensors` or `pytorch_model.bin`; see `scfm.load`."""
    path, bert = files.path, files.json("config.json")
    n_tokens = bert.get("vocab_size")
    if not isinstance(n_tokens, int):
        raise ModelFileError(
            f"{path}: config.json has vocab_size {n_tokens!r}; it must be a positive number of tokens."
        )
    tokens = find_vocabulary(path, vocabulary, n_tokens=n_tokens)
    if len(tokens) != n_tokens:
        raise ModelFileError(
            f"{path} was trained with {n_tokens:,} tokens, but the vocabulary has {len(tokens):,}. "
            "Use the gc30M dictionaries for V1 (25,426 tokens), and gc104M for V2 (20,275)."
        )
    state = _read_state(files)
    config = _model_config(bert, tokens, state, path)
    encoding = make_encoding(
        _encoding_config(config, tokens),
        vocabulary=tokens,
        medians=find_medians(path, medians, tokens, vocabulary_source=vocabulary),
    )
    copies = _copies(state, config, path)
    network, unused = build_network(
        config, tokens, state, published_names(config), source=str(path), unused=copies, strict=strict
    )
    labels = _labels(bert) if config.classes.n_classes else ()
    objective = "masked_genes" if config.heads.genes else None
    checkpoint = Checkpoint(family=NAME, unused=unused)
    return Model(network, encoding, labels=labels, objective=objective, checkpoint=checkpoint)


def write(model: Model, path: Path) -> None:
    """Write a directory for `transformers.AutoModelForMaskedLM` (or its classifiers), with the dictionaries."""
    config = model.network.config
    require(config, {**_FIXED, "d_head": config.d_model // config.n_heads}, "Geneformer")
    if config.classes.n_classes and config.classes.kind not in BERT_CLASSES.values():
        raise ModelFileError(
            f"This model has a class head of kind {config.classes.kind!r}, which BERT's classifiers do not have. "
            "Convert a model that was fitted without labels, or one with a 'pooler' or 'token' head."
        )
    state = read_network(model.network, published_names(config))
    if not config.embedding.n_token_types:  # BERT always has this table; zeros do not change the sum
        state["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, config.d_model)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(_bert_config(model), indent=1))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    write_dictionaries(model.encoding, path)


_FIXED = {
    "norm": "post",
    "activation": "relu",
    "dropout_in_feed_forward": False,
    "final_norm": False,
    "decoder": None,
    "attention.kind": "softmax",
    "attention.qkv_bias": True,
    "embedding.positions": "rank",
    "embedding.values": "none",
    "embedding.norm": True,
    "embedding.gene_norm": False,
    "embedding.batch_norm": "none",
}


def published_names(config: ModelConfig) -> list[WeightMapping]:
    """Return the mappings of the tensors of `BertForMaskedLM` and of the two classifiers."""
    listed = [
        weight("embedding.gene.weight", WORDS),
        weight("embedding.rank.weight", "bert.embeddings.position_embeddings.weight"),
        *weight_and_bias("embedding.norm", "bert.embeddings.LayerNorm"),
    ]
    if config.embedding.n_token_types:
        listed.append(weight("embedding.token_type.weight", "bert.embeddings.token_type_embeddings.weight"))
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"bert.encoder.layer.{layer}"
        for part in ("weight", "bias"):
            attention = [f"{theirs}.attention.self.{name}.{part}" for name in ("query", "key", "value")]
            listed.append(weight(f"{ours}.attention.qkv.{part}", *attention))
        listed += weight_and_bias(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        listed += weight_and_bias(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        listed += weight_and_bias(f"{ours}.feed_forward.up", f"{theirs}.intermediate.dense")
        listed += weight_and_bias(f"{ours}.feed_forward.down", f"{theirs}.output.dense")
        listed += weight_and_bias(f"{ours}.feed_forward_norm", f"{theirs}.output.LayerNorm")
    if config.heads.genes:
        listed.append(weight("gene_head.bias", "cls.predictions.bias"))
        listed += weight_and_bias("gene_head.transform", "cls.predictions.transform.dense")
        listed += weight_and_bias("gene_head.norm", "cls.predictions.transform.LayerNorm")
    if config.classes.n_classes:
        listed += weight_and_bias("class_head.linear", "classifier")
        listed += weight_and_bias("class_head.pooler", "bert.pooler.dense") if config.classes.kind == "pooler" else []
    return listed


def _read_state(files: CheckpointFiles) -> State:
    if files.has("model.safetensors"):
        return without_wrapper(read_weights(files / "model.safetensors"), str(files))
    if files.has("pytorch_model.bin"):
        return without_wrapper(files.torch("pytorch_model.bin"), str(files))
    raise ModelFileError(f"{files} has neither model.safetensors nor pytorch_model.bin beside its config.json.")


def _copies(state: State, config: ModelConfig, path: Path) -> dict[str, str]:
    copies = tied(
        state,
        {"cls.predictions.decoder.weight": WORDS, "cls.predictions.decoder.bias": "cls.predictions.bias"},
        str(path),
    )
    positions = state.get("bert.embeddings.position_ids")
    if positions is not None and torch.equal(positions.flatten(), torch.arange(config.context_length)):
        copies["bert.embeddings.position_ids"] = "the numbers 0, 1, 2, ..., which are not weights"
    return copies


def _model_config(bert: Mapping[str, Any], vocabulary: Vocabulary, state: State, path: Path) -> ModelConfig:
    wanted = {"hidden_act": "relu", "position_embedding_type": "absolute"}
    for name, value in wanted.items():
        if bert.get(name, value) != value:
            raise ModelFileError(f"{path}: config.json has {name} {bert[name]!r}; Geneformer has {value!r}.")
    head = "classifier.weight" in state
    kind = "pooler" if "bert.pooler.dense.weight" in state else "token"
    try:
        return ModelConfig.from_dict(
            merged(
                ARCHITECTURE,
                {
                    "n_tokens": bert["vocab_size"],
                    "pad_id": vocabulary.pad_id,
                    "context_length": bert["max_position_embeddings"],
                    "d_model": bert["hidden_size"],
                    "n_heads": bert["num_attention_heads"],
                    "n_layers": bert["num_hidden_layers"],
                    "d_ff": bert["intermediate_size"],
                    "dropout": bert.get("hidden_dropout_prob", 0.1),
                    "norm_eps": bert.get("layer_norm_eps", 1e-12),
                    "embedding": {"n_token_types": bert.get("type_vocab_size", 2)},
                    "heads": {"genes": not head},
                    "classes": {
                        "kind": kind if head else "batch_norm",
                        "dropout": bert.get("classifier_dropout") or bert.get("hidden_dropout_prob", 0.1),
                        "n_classes": state["classifier.weight"].shape[0] if head else 0,
                    },
                    "pooling": {"how": "cls" if vocabulary.cls_id is not None else "mean", "hidden_layer": -2},
                },
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: config.json does not describe a BERT ({error!r}).") from error


def _encoding_config(config: ModelConfig, vocabulary: Vocabulary) -> EncodingConfig:
    v2 = vocabulary.cls_id is not None
    return EncodingConfig(
        kind="rank",
        context_length=config.context_length,
        add_cls=v2,
        add_eos=vocabulary.eos_id is not None,
        duplicates="sum" if v2 else "error",
    )


def _labels(bert: Mapping[str, Any]) -> tuple[str, ...]:
    names = bert.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _bert_config(model: Model) -> dict[str, Any]:
    config = model.network.config
    kinds = {kind: name for name, kind in BERT_CLASSES.items()}
    labels = {str(place): name for place, name in enumerate(model.labels)}
    return {
        "architectures": [kinds[config.classes.kind] if config.classes.n_classes else "BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": config.n_tokens,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": "relu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.context_length,
        "type_vocab_size": config.embedding.n_token_types or 2,
        "layer_norm_eps": config.norm_eps,
        "pad_token_id": config.pad_id,
        "tie_word_embeddings": True,
        **({"id2label": labels, "label2id": {name: int(key) for key, name in labels.items()}} if labels else {}),
    }


def _preset(name: str, layers: int, width: int, heads: int, d_ff: int, *, v2: bool) -> Preset:
    context = 4096 if v2 else 2048
    special = {"add_cls": True, "add_eos": True, "duplicates": "sum"} if v2 else {}
    return Preset(
        name=name,
        family=NAME,
        encoding={**ENCODING, "context_length": context, **special},
        network={
            **ARCHITECTURE,
            "n_layers": layers,
            "d_model": width,
            "n_heads": heads,
            "d_ff": d_ff,
            "context_length": context,
            "dropout": 0.1 if v2 else 0.02,
            "embedding": {**ARCHITECTURE["embedding"], "n_token_types": 2},
            "pooling": {"how": "cls" if v2 else "mean", "hidden_layer": -2},
        },
        objective="masked_genes",
        objectives=OBJECTIVES,
        n_tokens=20_275 if v2 else 25_426,
        source="Chen et al. 2024" if v2 else "Theodoris et al. 2023",
    )


add_family(
    Family(
        name=NAME,
        layout="a Geneformer directory (config.json of a BERT)",
        encoding=ENCODING,
        architecture=ARCHITECTURE,
        presets=(
            _preset("geneformer-v1-10m", 6, 256, 4, 512, v2=False),
            _preset("geneformer-v1-12l", 12, 512, 8, 1024, v2=False),
            _preset("geneformer-v2-104m", 12, 768, 12, 3072, v2=True),
            _preset("geneformer-v2-316m", 18, 1152, 18, 4608, v2=True),
        ),
        objectives=OBJECTIVES,
        files=(
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "*dictionary*",
            "*gene_name_id*",
            "*ensembl_mapping*",
        ),
        shared_files=tuple(f"{folder}/*.pkl" for folder in SHARED_FOLDERS),
        recognize=recognize,
        read=read,
        write=write,
    )
)
