"""The dictionaries that a checkpoint needs: from an argument, or from beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.encoding import Encoding, read_medians, read_vocabulary
from scfm.errors import ModelFileError, VocabularyMismatchError
from scfm.vocab import Vocabulary

# A path to a pickle, JSON or table, or the content itself.
Source = str | Path | Mapping[str, Any] | Vocabulary | NDArray[np.float64]

VOCABULARY_FILES = ("vocab.json", "vocabulary.json", "*token_dictionary*", "*tokens*.tsv")
MEDIAN_FILES = ("*median_dictionary*", "*median*.json", "*medians*.tsv")


def find_vocabulary(path: Path, given: Source | None, *, add_special: Sequence[str] = ()) -> Vocabulary:
    """Read the vocabulary that was given, or the one that lies in the directory `path`.

    Raises
    ------
    ModelFileError
        If there is none, or it cannot be read.
    """
    if isinstance(given, Vocabulary):
        return given
    source = given if given is not None else _beside(path, VOCABULARY_FILES)
    if source is None:
        raise ModelFileError(
            f"{path} holds no vocabulary. Pass `vocabulary=`: a path to the published token dictionary (pickle, JSON or "
            "TSV), or a mapping of token to id."
        )
    if not isinstance(source, (str, Path, Mapping)):
        raise TypeError(f"`vocabulary` is a {type(source).__name__}; pass a path, a mapping or a Vocabulary.")
    try:
        return read_vocabulary(source, add_special=add_special)
    except (ValueError, OSError) as error:
        if isinstance(error, (ModelFileError, VocabularyMismatchError)):
            raise
        raise ModelFileError(f"The vocabulary {source} cannot be used: {error}") from error


def find_medians(path: Path, given: Source | None, vocabulary: Vocabulary) -> NDArray[np.float64]:
    """Read the medians that were given (by gene, or an array by token id), or those in the directory `path`."""
    if isinstance(given, np.ndarray):
        return given
    source = given if given is not None else _beside(path, MEDIAN_FILES)
    if source is None:
        raise ModelFileError(
            f"{path} holds no medians, without which genes cannot be ranked. Pass `medians=`: a path to the published "
            "median dictionary (pickle, JSON or TSV), or a mapping of gene to median."
        )
    if not isinstance(source, (str, Path, Mapping)):
        raise TypeError(f"`medians` is a {type(source).__name__}; pass a path, a mapping or an array.")
    try:
        return read_medians(source, vocabulary)
    except OSError as error:
        raise ModelFileError(f"The medians {source} cannot be read: {error}") from error


def write_dictionaries(encoding: Encoding, path: Path) -> None:
    """Write token ids, and medians where there are any, as JSON beside the weights."""
    tokens = encoding.vocabulary.tokens
    (path / "token_dictionary.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    if encoding.medians is not None:
        medians = {token: value for token, value in zip(tokens, encoding.medians.tolist()) if value == value}
        (path / "median_dictionary.json").write_text(json.dumps(medians))


def _beside(path: Path, patterns: Sequence[str]) -> Path | None:
    if not path.is_dir():
        return None
    return next((file for pattern in patterns for file in sorted(path.glob(pattern))), None)
