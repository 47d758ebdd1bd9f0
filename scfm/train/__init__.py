"""Training: configuration, the Lightning module, callbacks. No other package of scfm imports Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scfm._lazy import at_first_use
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


__getattr__ = at_first_use(globals(), _NEED_LIGHTNING)


def __dir__() -> list[str]:
    return sorted(__all__)
