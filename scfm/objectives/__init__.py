"""Training objectives: each corrupts a batch and scores the network's answer."""

from scfm.objectives.base import Loss, Objective, Targets, Term, total
from scfm.objectives.classify import Classification, class_weights
from scfm.objectives.masked import MaskedGenes, MaskedValues

__all__ = [
    "Classification",
    "Loss",
    "MaskedGenes",
    "MaskedValues",
    "Objective",
    "Targets",
    "Term",
    "class_weights",
    "total",
]
