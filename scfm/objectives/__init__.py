"""Training objectives: each hides a part of a batch, and computes the loss of the network's prediction."""

from scfm.objectives.base import (
    OBJECTIVES,
    Loss,
    Objective,
    PretrainingObjective,
    Targets,
    Term,
    at_step,
    make_objective,
    total,
)
from scfm.objectives.classify import Classification, class_weights
from scfm.objectives.classify_genes import GeneClassification
from scfm.objectives.generative import Generative
from scfm.objectives.integrate import Integration
from scfm.objectives.masked import MaskedBuckets, MaskedGenes, MaskedValues
from scfm.objectives.profile import Profile
from scfm.objectives.read_depth import ReadDepth

__all__ = [
    "Classification",
    "GeneClassification",
    "Generative",
    "Integration",
    "Loss",
    "MaskedBuckets",
    "MaskedGenes",
    "MaskedValues",
    "OBJECTIVES",
    "Objective",
    "PretrainingObjective",
    "Profile",
    "ReadDepth",
    "Targets",
    "Term",
    "at_step",
    "class_weights",
    "make_objective",
    "total",
]
