"""In-silico perturbation: exact computation, screens of all genes, prediction of Perturb-seq, gene networks."""

from scfm.perturbation.evaluate import evaluate_perturbation
from scfm.perturbation.exact import perturb
from scfm.perturbation.network import attention, gene_network
from scfm.perturbation.prediction.predict import predict_perturbation, score_perturbation_prediction
from scfm.perturbation.screening.screen import screen

__all__ = [
    "attention",
    "evaluate_perturbation",
    "gene_network",
    "perturb",
    "predict_perturbation",
    "score_perturbation_prediction",
    "screen",
]
