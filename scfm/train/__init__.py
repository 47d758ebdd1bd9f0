"""Training: configuration, the Lightning module, callbacks. The only place that imports Lightning."""

from scfm.train.config import FitConfig
from scfm.train.loop import train
from scfm.train.module import NonFiniteLossError, TrainingModule

__all__ = ["FitConfig", "NonFiniteLossError", "TrainingModule", "train"]
