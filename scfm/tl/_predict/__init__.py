"""Expression after a perturbation that was not measured, and how well simple methods do."""

from scfm.tl._predict.predict import predict_perturbation, score_perturbation_prediction

__all__ = ["predict_perturbation", "score_perturbation_prediction"]
