"""Find the vocabulary and the medians of a checkpoint, from an argument or in the usual folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.encoding import Encoding, read_aliases, read_medians, read_vocabulary
from scfm.errors import ModelFileError, VocabularyMismatchError
from scfm.vocab import Vocabulary

# A path to a pickle, JSON file, table or folder, or the content itself.
Source = str | Path | Mapping[str, Any] | Vocabulary | NDArray[np.float64]

VOCABULARY_FILES = ("vocab.json", "vocabulary.json", "*token_dictionary*", "*tokens*.tsv")
MEDIAN_FILES = ("*median_dictionary*", "*median*.json", "*medians*.tsv")
ALIAS_FILES = ("*ensembl_mapping*", "*gene_name_id*")
# Folders that several models of a repository share; each family adds its own.
SHARED_FOLDERS: list[str] = []
MAX_GENES_WITHOUT_MEDIAN = 0.01  # fraction of the vocabulary; it is 0 if both belong to the same model


def find_vocabulary(
    path: Path, given: Source | None, *, n_tokens: int | None = None, add_special: Sequence[str] = ()
) -> Vocabulary:
    """Read the given vocabulary, or the one in the folders of the checkpoint `path`.

    If the vocabulary has Ensembl ids and a dictionary of gene names is in the same folder, the names become aliases.

    Parameters
    ----------
    path
        File or folder of the checkpoint.
    given
        A vocabulary, a mapping of token to id, a file, or a folder to search. None to search the usual folders.
    n_tokens
        Number of tokens of the checkpoint. If several dictionaries are found, the one of this size is read.
    add_special
        Roles of special tokens to add; see `scfm.encoding.read_vocabulary`.

    Raises
    ------
    ModelFileError
        If no vocabulary of this size is found, or it cannot be read.
    """
    if isinstance(given, Vocabulary):
        return given
    if isinstance(given, Mapping):
        return _read(given, add_special)
    found: dict[Path, int] = {}
    for file in _files(path, given, VOCABULARY_FILES, "vocabulary"):
        vocabulary = _read(file, add_special)
        if n_tokens in (None, len(vocabulary)):
            return _with_aliases(vocabulary, file.parent)
        found[file] = len(vocabulary)
    if found:
        listing = ", ".join(f"{file} has {size:,}" for file, size in found.items())
        raise ModelFileError(
            f"{path} was trained with {n_tokens:,} tokens, but {listing}. Pass the dictionary of this model as `vocabulary=`. "
            "For Geneformer, V1 uses gc30M (25,426 tokens), and V2 uses gc104M (20,275 tokens)."
        )
    raise ModelFileError(
        f"{path} has no vocabulary. Pass `vocabulary=`: the path of the published token dictionary (pickle, JSON or "
        "TSV) or of its folder, or a mapping of token to id."
    )


def find_medians(
    path: Path, given: Source | None, vocabulary: Vocabulary, *, vocabulary_source: Source | None = None
) -> NDArray[np.float64]:
    """Read the given medians (by gene, or an array by token id), or those in the folders of the checkpoint.

    Raises
    ------
    ModelFileError
        If none are found, or if many genes of the vocabulary have no median, because they belong to another model version.
    """
    if isinstance(given, np.ndarray):
        return given
    if isinstance(given, Mapping):
        return _covering(read_medians(given, vocabulary), vocabulary, "`medians`")
    near = vocabulary_source if given is None and isinstance(vocabulary_source, (str, Path)) else None
    files = [*_files(path, given, MEDIAN_FILES, "medians")]
    files += [*_files(path, Path(near).parent, MEDIAN_FILES, "medians")] if near and Path(near).is_file() else []
    files += [*_files(path, near, MEDIAN_FILES, "medians")] if near and Path(near).is_dir() else []
    for number, file in enumerate(files, start=1):
        try:
            return _covering(read_medians(file, vocabulary), vocabulary, str(file))
        except OSError as error:
            raise ModelFileError(f"The medians {file} cannot be read: {error}") from error
        except ModelFileError:
            if number == len(files):
                raise
    raise ModelFileError(
        f"{path} has no medians, which are needed to rank genes. Pass `medians=`: the path of the published "
        "median dictionary (pickle, JSON or TSV) or of its folder, or a mapping of gene to median."
    )


def write_dictionaries(encoding: Encoding, path: Path) -> None:
    """Write token ids, and medians if there are any, as JSON files in the folder of the weights."""
    tokens = encoding.vocabulary.tokens
    (path / "token_dictionary.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    if encoding.medians is not None:
        medians = {token: value for token, value in zip(tokens, encoding.medians.tolist()) if value == value}
        (path / "median_dictionary.json").write_text(json.dumps(medians))


def _read(source: Path | Mapping[str, Any], add_special: Sequence[str]) -> Vocabulary:
    try:
        return read_vocabulary(source, add_special=add_special)
    except (ValueError, OSError) as error:
        if isinstance(error, (ModelFileError, VocabularyMismatchError)):
            raise
        raise ModelFileError(f"The vocabulary {source} cannot be used: {error}") from error


def _covering(medians_V: NDArray[np.float64], vocabulary: Vocabulary, source: str) -> NDArray[np.float64]:
    n_missing = int(np.isnan(medians_V[vocabulary.gene_ids]).sum())
    if n_missing > max(10, MAX_GENES_WITHOUT_MEDIAN * vocabulary.n_genes):
        raise ModelFileError(
            f"{source} has no median for {n_missing:,} of the {vocabulary.n_genes:,} genes of the vocabulary, so it belongs to "
            "another version of the model. Use the medians and the token dictionary of one version (both gc30M, or both "
            "gc104M)."
        )
    return medians_V


def _with_aliases(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    """Add gene names from a dictionary in `folder` as aliases of the Ensembl ids of the vocabulary."""
    files = list(_matching([folder], ALIAS_FILES))
    if vocabulary.id_type != "ensembl" or not files:
        return vocabulary
    aliases = dict(vocabulary.aliases)
    for file in files:
        aliases |= read_aliases(file, vocabulary)
    return Vocabulary(vocabulary.tokens, special=vocabulary.special, id_type=vocabulary.id_type, aliases=aliases)


def _files(path: Path, given: Source | None, patterns: Sequence[str], argument: str) -> Iterator[Path]:
    """Yield the given file, the matching files of the given folder, or those of the usual folders."""
    if given is not None and not isinstance(given, (str, Path)):
        raise TypeError(f"`{argument}` is a {type(given).__name__}; pass a path, a mapping or the content itself.")
    if given is None:
        roots = [path, path.parent] if path.is_dir() else []
        folders = [path, *(root / name for root in roots for name in SHARED_FOLDERS)] if roots else []
    elif Path(given).is_dir():
        names = dict.fromkeys([*SHARED_FOLDERS, *(Path(name).name for name in SHARED_FOLDERS)])
        folders = [Path(given), *(Path(given) / name for name in names)]
    else:
        yield Path(given)
        return
    yield from _matching(folders, patterns)


def _matching(folders: Sequence[Path], patterns: Sequence[str]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        for pattern in patterns:
            for file in sorted(folder.glob(pattern)) if folder.is_dir() else []:
                if file.is_file() and file not in seen:
                    seen.add(file)
                    yield file
