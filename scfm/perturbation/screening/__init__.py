"""Screens: estimate the effects of all genes from a few backward passes, and compute the largest exactly."""
