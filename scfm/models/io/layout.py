"""Names of the files of a saved model, and the version of the format."""

from __future__ import annotations

FORMAT = "scfm"
FORMAT_VERSION = 3
CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocabulary.json", "weights.safetensors"
ARRAYS = "encoding.safetensors"
