"""Training: configuration, the Lightning module, callbacks. No other package of scfm imports Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scfm.train.config import FitConfig
from scfm.train.stage import run_stage
from scfm.train.stream import CellStream
from scfm.train.trainable import merge, set_trainable

if TYPE_CHECKING:
    from scfm.train.loop import train
    from scfm.train.module import NonFiniteLossError, TrainingModule
    from scfm.train.pretraining import pretrain

__all__ = [
    "CellStream",
    "FitConfig",
    "NonFiniteLossError",
    "TrainingModule",
    "merge",
    "pretrain",
    "run_stage",
    "set_trainable",
    "train",
]

# Lightning takes seconds to import, so what needs it is imported at first use.
_NEED_LIGHTNING = {
    "NonFiniteLossError": "scfm.train.module",
    "TrainingModule": "scfm.train.module",
    "pretrain": "scfm.train.pretraining",
    "train": "scfm.train.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_LIGHTNING:
        raise AttributeError(f"module 'scfm.train' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_NEED_LIGHTNING[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
