"""Annotation: splits, linear probe, gene classifier, ensemble, calibration, fine-tuning, scores, gene classification."""
