"""Model families, one per file, each with its encoding, architecture, presets, objectives and checkpoint format."""

from scfm.families._presets import choose_preset, preset, presets, sizes, table
from scfm.families.base import FAMILIES, Family, Preset, add_family, merged
from scfm.families.loading import convert, load, recognize

__all__ = [
    "FAMILIES",
    "Family",
    "Preset",
    "add_family",
    "choose_preset",
    "convert",
    "load",
    "merged",
    "preset",
    "presets",
    "recognize",
    "sizes",
    "table",
]
