"""Figures with scanpy's conventions (`ax=`, `show=`, `save=`), in colors that color-blind readers can distinguish."""

from scfm.pl._attention import attention
from scfm.pl._confusion import confusion
from scfm.pl._embedding import embedding
from scfm.pl._gene_network import gene_network
from scfm.pl._perturbation import perturbation, volcano
from scfm.pl._report import report
from scfm.pl._screen import screen
from scfm.pl._training import training

__all__ = [
    "attention",
    "confusion",
    "embedding",
    "gene_network",
    "perturbation",
    "report",
    "screen",
    "training",
    "volcano",
]
