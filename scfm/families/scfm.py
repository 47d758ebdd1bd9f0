"""scfm's models: saved by `Model.save`, with the architecture of a published family, in smaller sizes."""

from __future__ import annotations

from typing import Any

from scfm.errors import ModelFileError
from scfm.families import geneformer, scgpt
from scfm.families._checkpoint import CheckpointFiles
from scfm.families.base import Family, Preset, add_family, merged
from scfm.models.io.dictionaries import Source
from scfm.models.io.hub import PATTERNS
from scfm.models.io.layout import CONFIG, FORMAT
from scfm.models.io.load import load_saved
from scfm.models.model import Model

NAME = "scfm"
SIZES: dict[str, dict[str, int]] = {
    "small": {"d_model": 128, "n_heads": 4, "n_layers": 3, "d_ff": 256},
    "medium": {"d_model": 256, "n_heads": 8, "n_layers": 6, "d_ff": 512},
    "large": {"d_model": 512, "n_heads": 8, "n_layers": 12, "d_ff": 1024},
}
# For small data, embeddings are not divided by their norm, and values are not predicted from cell embeddings.
# The order of tokens holds how strongly a gene is expressed, and a plain mean ignores it.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "rank": merged(geneformer.ARCHITECTURE, {"pooling": {"how": "weighted"}}),
    "bin": merged(scgpt.ARCHITECTURE, {"pooling": {"normalize": False}, "heads": {"values_from_cells": False}}),
}
OBJECTIVES: dict[str, dict[str, str]] = {
    "rank": {**geneformer.OBJECTIVES, "profile": "profile"},
    "bin": scgpt.OBJECTIVES,
}
_FAMILY_OF = {"rank": geneformer, "bin": scgpt}


def _preset(size: str, encoding: str) -> Preset:
    objectives = OBJECTIVES[encoding]
    return Preset(
        name=f"{size}-{encoding}",
        size=size,
        family=NAME,
        encoding={**_FAMILY_OF[encoding].ENCODING, "context_length": 1024},
        network={**ARCHITECTURES[encoding], **SIZES[size], "context_length": 1024, "dropout": 0.1},
        objective=objectives["masked"],
        objectives=objectives,
    )


def recognize(files: CheckpointFiles) -> bool:
    """Whether this is a directory that `Model.save` wrote, in any format version."""
    return files.has(CONFIG) and files.json(CONFIG).get("format") == FORMAT


def read(files: CheckpointFiles, *, vocabulary: Source | None, medians: Source | None, strict: bool) -> Model:
    """Read a directory that `Model.save` wrote; all tensors must match, whatever `strict` is."""
    if vocabulary is not None or medians is not None:
        raise ModelFileError(
            f"{files} is a saved scfm model, which contains its vocabulary. Do not pass `vocabulary` and `medians`."
        )
    return Model(**vars(load_saved(files.path)))


add_family(
    Family(
        name=NAME,
        layout="a directory that `model.save` wrote",
        encoding={},
        architecture={},
        presets=tuple(_preset(size, encoding) for encoding in ARCHITECTURES for size in SIZES),
        objectives={},
        files=PATTERNS,
        recognize=recognize,
        read=read,
        write=Model.save,
    )
)
