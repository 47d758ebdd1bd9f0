"""Training: configuration, the Lightning module, callbacks. No other package of scfm imports Lightning."""

from scfm.train.config import FitConfig
from scfm.train.loop import train
from scfm.train.module import NonFiniteLossError, TrainingModule
from scfm.train.pretraining import pretrain
from scfm.train.stage import run_stage
from scfm.train.stream import CellStream
from scfm.train.trainable import merge, set_trainable

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
