"""Convert format 1, which had flat settings and kept labels, calibration and scores in the history, to format 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Group and field of each setting that is no longer a field of ModelConfig.
_GROUPED = {
    "head_width": ("attention", "head_width"),
    "qkv_bias": ("attention", "qkv_bias"),
    "attention": ("attention", "kind"),
    "n_random_features": ("attention", "n_random_features"),
    "redraw_interval": ("attention", "redraw_interval"),
    "skip_unknown_out": ("attention", "skip_target_projection"),
    "positions": ("embedding", "positions"),
    "values": ("embedding", "values"),
    "n_value_bins": ("embedding", "n_value_bins"),
    "bin_alpha": ("embedding", "bin_alpha"),
    "unknown_tokens": ("embedding", "target_input"),
    "n_token_types": ("embedding", "n_token_types"),
    "gene_norm": ("embedding", "gene_norm"),
    "train_gene_embedding": ("embedding", "train_genes"),
    "embedding_norm": ("embedding", "norm"),
    "batch_norm": ("embedding", "batch_norm"),
    "gene_head": ("heads", "genes"),
    "value_head": ("heads", "values"),
    "zero_head": ("heads", "zeros"),
    "value_from_cell_head": ("heads", "values_from_cells"),
    "batch_labels": ("heads", "batch_labels"),
    "batch_head": ("heads", "batches"),
    "class_head": ("classes", "kind"),
    "n_classes": ("classes", "n_classes"),
    "n_class_layers": ("classes", "n_layers"),
    "class_dropout": ("classes", "dropout"),
    "gene_classifier": ("classes", "gene_classifier"),
    "pooling": ("pooling", "how"),
    "embedding_layer": ("pooling", "hidden_layer"),
    "normalize_embedding": ("pooling", "normalize"),
}


def network_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `ModelConfig` for the flat settings of format 1."""
    settings: dict[str, Any] = {}
    for name, value in flat.items():
        if name in _GROUPED:
            group, field = _GROUPED[name]
            settings.setdefault(group, {})[field] = value
        elif not name.startswith("decoder_"):
            settings[name] = value
    if flat.get("class_head") == "normalised":
        settings["classes"]["kind"] = "batch_norm"
    if flat.get("decoder_layers"):
        settings["decoder"] = {
            "n_layers": flat["decoder_layers"],
            "d_model": flat["decoder_width"],
            "n_heads": flat["decoder_heads"],
            "d_ff": 4 * flat["decoder_width"],
            "attention": {
                "kind": "linear",
                "head_width": flat["decoder_head_width"],
                "qkv_bias": False,
                "n_random_features": flat["n_random_features"],
                "redraw_interval": flat["redraw_interval"],
            },
        }
    return settings


def content(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a format 1 config.json in format 2; directions of the screen are not kept."""
    history = dict(config["history"])
    fitted, published = history.pop("calibration", None), history.pop("published", None)
    history.pop("screen", None)
    calibration = fitted and {
        "n_cells": fitted["n_cells"],
        "transformer_temperature": fitted["temperature"]["transformer"],
        "ensemble_temperature": fitted["temperature"]["ensemble"],
        "typical_distance": fitted["usual_distance"],
    }
    checkpoint = published and {
        "family": published["family"],
        "unused": published["unused"],
        "settings": {name: value for name, value in published.items() if name not in ("family", "unused")},
    }
    return {
        **config,
        "network": network_settings(config["network"]),
        "calibration": calibration,
        "checkpoint": checkpoint,
        "objective": next(
            (stage["objective"] for stage in history.get("stages", []) if stage["name"] == "pretraining"), None
        ),
        "scores": history.pop("report", None),
        "history": history,
    }
