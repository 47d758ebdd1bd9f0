"""Single-cell foundation models on AnnData: encode, pretrain, fine-tune, annotate, perturb in silico, embed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scfm import (
        baselines,
        data,
        datasets,
        encoding,
        errors,
        families,
        models,
        nn,
        objectives,
        ops,
        pl,
        pp,
        tl,
        train,
    )
    from scfm.data import CellBatch
    from scfm.encoding import EncodingConfig
    from scfm.families import load
    from scfm.models import Model, ModelConfig
    from scfm.tl import fit
    from scfm.train import FitConfig, pretrain
    from scfm.vocab import Vocabulary

# Modules are loaded at first use, so that `import scfm` is fast, and scfm.ops, scfm.nn and scfm.models need torch only.
_MODULES = (
    "baselines", "data", "datasets", "encoding", "errors", "families", "models", "nn", "objectives", "ops",
    "pl", "pp", "tl", "train",
)  # fmt: skip
_NAMES = {
    "CellBatch": "scfm.data",
    "EncodingConfig": "scfm.encoding",
    "FitConfig": "scfm.train",
    "Model": "scfm.models",
    "ModelConfig": "scfm.models",
    "Vocabulary": "scfm.vocab",
    "fit": "scfm.tl",
    "load": "scfm.families",
    "pretrain": "scfm.train",
}

__all__ = [
    "CellBatch", "EncodingConfig", "FitConfig", "Model", "ModelConfig", "Vocabulary", "baselines", "data", "datasets",
    "encoding", "errors", "families", "fit", "load", "models", "nn", "objectives", "ops", "pl", "pp", "pretrain", "tl", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"scfm.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("single-cell-fm")
    raise AttributeError(f"module 'scfm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
