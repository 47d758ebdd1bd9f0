"""In-silico perturbation: edits of cells, variants, their shifts, statistics."""

from scfm.tl._perturb.perturb import perturb

__all__ = ["perturb"]
