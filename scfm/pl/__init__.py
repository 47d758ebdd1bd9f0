"""Figures: scanpy's conventions (`ax=`, `show=`, `save=`), colours that colour-blind eyes tell apart."""

from scfm.pl._confusion import confusion
from scfm.pl._embedding import embedding
from scfm.pl._perturbation import perturbation
from scfm.pl._report import report
from scfm.pl._screen import screen
from scfm.pl._training import training
from scfm.pl._volcano import volcano

__all__ = ["confusion", "embedding", "perturbation", "report", "screen", "training", "volcano"]
