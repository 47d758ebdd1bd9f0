"""Tensors of earlier format versions, by the names and in the shapes that the network has now."""

# Axes: C classes.

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from scfm.nn.novelty import KINDS

_RENAMED = {"gene_classifier.vote_weights": "gene_classifier.ensemble_weights"}  # format 1
# Format 3 had one value for all classes and each of the two distances, where there is one for each class now.
_SPREAD = {
    "novelty.location": [f"novelty.{kind}_location_C" for kind in KINDS],
    "novelty.scale": [f"novelty.{kind}_scale_C" for kind in KINDS],
}


def current_shapes(shapes: Mapping[str, tuple[int, ...]], n_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name, after the conversion of `current_tensors`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name in _SPREAD and shape == (len(KINDS),):
            found |= dict.fromkeys(_SPREAD[name], (n_classes,))
        else:
            found[_RENAMED.get(name, name)] = shape
    return found


def current_tensors(tensors: Mapping[str, Tensor], n_classes: int) -> dict[str, Tensor]:
    """Return the tensors by the names and in the shapes that the network has now."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _SPREAD:
            found |= {now: value.expand(n_classes) for now, value in zip(_SPREAD[name], tensor)}
        else:
            found[_RENAMED.get(name, name)] = tensor
    return found
