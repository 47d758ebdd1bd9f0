"""Names of the files of a saved model, and the version of the format."""

from __future__ import annotations

from pathlib import Path

FORMAT = "scfm"
FORMAT_VERSION = 4
CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocabulary.json", "weights.safetensors"
ARRAYS = "encoding.safetensors"
# Models that are part of the package; their names are those of the folders in it.
SHIPPED = Path(__file__).parents[2] / "shipped"


def shipped() -> dict[str, Path]:
    """Return the directories of the models that are part of the package, by name."""
    return {config.parent.name: config.parent for config in sorted(SHIPPED.glob(f"*/{CONFIG}"))}
