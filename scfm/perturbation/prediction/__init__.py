"""Prediction of the expression after unmeasured perturbations, and its comparison with simple methods."""
