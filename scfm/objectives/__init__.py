"""Training objectives: each corrupts a batch and scores the network's answer."""

from scfm.objectives.base import Loss, Objective, Targets, Term, total
from scfm.objectives.classify import Classification, class_weights
from scfm.objectives.generative import Generative
from scfm.objectives.integrate import Integration
from scfm.objectives.masked import MaskedBuckets, MaskedGenes, MaskedValues
from scfm.objectives.read_depth import ReadDepth

__all__ = [
    "Classification",
    "Generative",
    "Integration",
    "Loss",
    "MaskedBuckets",
    "MaskedGenes",
    "MaskedValues",
    "Objective",
    "ReadDepth",
    "Targets",
    "Term",
    "class_weights",
    "total",
]
