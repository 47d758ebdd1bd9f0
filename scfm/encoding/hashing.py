"""Random numbers as a hash of seed, cell and gene, so that they do not depend on the order in which they are drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of 64-bit integers with the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        state = state + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        return state ^ (state >> np.uint64(31))


def hash_pairs(seed: int, first: NDArray[np.integer] | int, second: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Hash (seed, first, second) to 64 bits. Shapes are broadcast."""
    state = mix(np.asarray(seed, dtype=np.uint64))
    state = mix(state ^ np.asarray(first).astype(np.uint64))
    return mix(state ^ np.asarray(second).astype(np.uint64))


def to_unit(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map 64 random bits to [0, 1), float64, using the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
