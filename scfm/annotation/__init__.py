"""Annotation of cells and genes: splits, probes, ensembles, calibration, and the report."""
