"""Read published gene tables: token ids, medians, aliases. Pickles may hold plain values only."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm._untrusted import check_pickle, require_downloaded
from scfm.errors import ModelFileError
from scfm.vocab import Vocabulary

# Names of the special tokens in published vocabularies.
_SPECIAL_ROLES = {"<pad>": "pad", "<mask>": "mask", "<cls>": "cls", "<eos>": "eos", "<eoc>": "eos"}


def read_vocabulary(
    path: str | Path | Mapping[str, int], *, aliases: str | Path | None = None, add_special: Sequence[str] = ()
) -> Vocabulary:
    """Read a published vocabulary: Geneformer's token dictionary, scGPT's JSON, scFoundation's gene list, or scfm's format.

    Parameters
    ----------
    path
        JSON or pickle of token to id, or a TSV or CSV file with a header, tokens in the first column and ids in the second.
        A mapping of token to id is accepted too.
    aliases
        File of aliases (see `read_aliases`), such as Geneformer's name-to-id dictionary.
    add_special
        Roles of special tokens to add after the last id if the file has none. scFoundation's vocabulary needs
        ``("target_depth", "source_depth", "pad")``.

    Raises
    ------
    ModelFileError
        If the format of the file is not supported, the file is unsafe, or its ids are not 0..n - 1.

    Examples
    --------
    >>> import json, pathlib, scfm
    >>> _ = pathlib.Path("vocab.json").write_text(json.dumps({"<pad>": 0, "CD74": 1, "CST3": 2}))  # scGPT's format
    >>> vocabulary = scfm.encoding.read_vocabulary("vocab.json")
    >>> vocabulary.genes, vocabulary.pad_id
    (('CD74', 'CST3'), 0)
    """
    ids = path if isinstance(path, Mapping) else _read_ids(Path(path))
    if "format_version" in ids:
        return Vocabulary.from_dict(ids)
    tokens = _in_order(ids, "The mapping" if isinstance(path, Mapping) else repr(str(path)))
    special = {role: token for token, role in _SPECIAL_ROLES.items() if token in ids}
    special |= {role: f"<{role}>" for role in add_special}
    tokens += [f"<{role}>" for role in add_special]
    vocabulary = Vocabulary(tokens, special=special)
    if aliases is None:
        return vocabulary
    return Vocabulary(tokens, special=special, aliases=read_aliases(aliases, vocabulary))


def _read_ids(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".json":
        return _read_json(path)
    if _is_pickle(path):
        return _read_pickle(path)
    return _unique((row[:2] for row in _read_rows(path)), repr(str(path)))


def read_medians(path: str | Path | Mapping[str, float], vocabulary: Vocabulary) -> NDArray[np.float64]:
    """Read published medians as an array by token id, shape (len(vocabulary),), float64; NaN for tokens without one.

    Parameters
    ----------
    path
        JSON or pickle of gene to median, or a TSV or CSV file with a header, genes in the first column and a column "median".
        A mapping of gene to median is accepted too.
    vocabulary
        Vocabulary whose ids index the result; other genes are omitted.

    Raises
    ------
    ModelFileError
        If the format of the file is not supported, the file is unsafe, or no gene of the vocabulary has a median.

    Examples
    --------
    >>> import scfm
    >>> vocabulary = scfm.Vocabulary.from_genes(["CD74", "CST3"], special=("pad",))
    >>> scfm.encoding.read_medians({"CST3": 1.5, "INS": 4.0}, vocabulary).tolist()
    [nan, nan, 1.5]
    """
    source = "The mapping" if isinstance(path, Mapping) else repr(str(path))
    table = path if isinstance(path, Mapping) else _read_median_table(Path(path))
    medians = np.full(len(vocabulary), np.nan)
    ids = vocabulary.token_ids(table)
    try:
        values = np.array([float(value) for value in table.values()])
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelFileError(f"{source} holds medians that are not numbers ({error}).") from error
    medians[ids[ids >= 0]] = values[ids >= 0]
    if np.isnan(medians[vocabulary.gene_ids]).all():
        raise ModelFileError(
            f"{source} has medians of {len(table)} genes, none of which is in {vocabulary}. Pass the medians and the "
            "vocabulary of the same model."
        )
    return medians


def _read_median_table(path: Path) -> Mapping[str, Any]:
    if _is_pickle(path) or path.suffix == ".json":
        return _read_pickle(path) if _is_pickle(path) else _read_json(path)
    header = _header(path)
    if "median" not in header:
        raise ModelFileError(f"{str(path)!r} has no column 'median'; its columns are {header}.")
    column = header.index("median")
    return {row[0]: row[column] for row in _read_rows(path) if row[column]}


def read_aliases(path: str | Path, vocabulary: Vocabulary) -> dict[str, str]:
    """Read aliases of genes as a mapping of alias to token; aliases of genes outside the vocabulary are omitted.

    Parameters
    ----------
    path
        JSON or pickle of alias to gene id, or a TSV or CSV file without a header whose columns are gene id and alias, as in
        GENCODE's files.
    vocabulary
        Vocabulary with the tokens.

    Examples
    --------
    >>> import pathlib, scfm
    >>> vocabulary = scfm.Vocabulary.from_genes(["ENSG00000019582"], special=("pad",))
    >>> _ = pathlib.Path("names.json").write_text('{"CD74": "ENSG00000019582", "INS": "ENSG00000254647"}')
    >>> scfm.encoding.read_aliases("names.json", vocabulary)
    {'CD74': 'ENSG00000019582'}
    """
    path = Path(path)
    if _is_pickle(path) or path.suffix == ".json":
        table = _read_pickle(path) if _is_pickle(path) else _read_json(path)
    else:
        table = {row[1]: row[0] for row in _read_rows(path, header=False)}
    return {str(alias): token for alias, token in table.items() if token in vocabulary and alias not in vocabulary}


class _PlainDType:
    """Replaces `numpy.dtype` while unpickling; it only stores the type of a plain number."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or code not in {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} | {
            "b1"
        }:
            raise ModelFileError(f"A pickled NumPy scalar has dtype {code!r}; only plain numbers are accepted.")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # (version, byte order, subtype, names, fields, size, alignment, flags); subtype, names and fields must be empty.
        if len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ModelFileError("A pickled NumPy dtype is not that of a plain number.")
        self.order = state[1]


class _PlainScalar:
    """Replaces `numpy.core.multiarray.scalar` while unpickling; converts bytes to a Python number."""

    def __new__(cls, dtype: _PlainDType, content: bytes) -> Any:
        if not isinstance(dtype, _PlainDType) or not isinstance(content, bytes):
            raise ModelFileError("A pickled NumPy scalar is not a plain number.")
        return np.frombuffer(content, dtype=np.dtype(dtype.order + dtype.code), count=1)[0].item()

    def __setstate__(self, state: object) -> None:
        raise ModelFileError("A pickled NumPy scalar carries a state; only plain numbers are accepted.")


_ALLOWED = {
    ("numpy", "dtype"): _PlainDType,
    ("numpy.core.multiarray", "scalar"): _PlainScalar,
    ("numpy._core.multiarray", "scalar"): _PlainScalar,
}


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, strings, numbers and NumPy scalars (as numbers); refuses anything else before calling it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ModelFileError(
                f"The pickle asks for {module}.{name}. Only plain containers, strings, numbers and NumPy scalars are "
                "read, because a pickle can run any code. Do not open this file by other means unless you trust its source."
            )
        return _ALLOWED[module, name]


def _is_pickle(path: Path) -> bool:
    return path.suffix in (".pkl", ".pickle")


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        require_downloaded(path)
        data = path.read_bytes()
        check_pickle(data, "it")
        content = _PlainUnpickler(io.BytesIO(data)).load()
    except ModelFileError as error:
        raise ModelFileError(f"{str(path)!r}: {error}") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise ModelFileError(f"{str(path)!r} is not a readable pickle ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ModelFileError(f"{str(path)!r} holds a {type(content).__name__}, not a dictionary with text keys.")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    require_downloaded(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, repr(str(path))))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"{str(path)!r} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{str(path)!r} holds a {type(content).__name__}, not a dictionary.")
    return content


def _unique(pairs: Iterable[Sequence[Any]], source: str) -> dict[str, Any]:
    """The pairs as a dictionary; a name that occurs twice has no one value."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ModelFileError(f"{source} has the entry {name!r} twice, with {content[name]!r} and {value!r}.")
        content[name] = value
    return content


def _header(path: Path) -> list[str]:
    return next(iter(_read_rows(path, header=False)), [])


def _read_rows(path: Path, *, header: bool = True) -> list[list[str]]:
    if path.suffix not in (".tsv", ".csv", ".txt"):
        raise ModelFileError(f"The format of {str(path)!r} is not supported; .json, .tsv, .csv and .pkl are.")
    require_downloaded(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="," if path.suffix == ".csv" else "\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ModelFileError(f"{str(path)!r} is not a table in UTF-8 ({error}). Save it as UTF-8 text.") from error
    if rows and min(map(len, rows)) < 2:
        raise ModelFileError(f"{str(path)!r} has lines with fewer than two columns; at least two are needed.")
    return rows[1:] if header else rows


def _in_order(ids: Mapping[str, Any], source: str) -> list[str]:
    """Return the tokens in the order of their ids, which must be 0..n - 1."""
    try:
        by_id = {_whole(number): token for token, number in ids.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelFileError(f"{source} does not map tokens to whole numbers ({error}).") from error
    if not by_id or len(by_id) < len(ids) or min(by_id) != 0 or max(by_id) != len(by_id) - 1:
        raise ModelFileError(
            f"{source} has {len(ids)} tokens with {len(by_id)} different ids, "
            f"{min(by_id, default=None)}..{max(by_id, default=None)}; ids must be 0..n - 1, and each must occur once."
        )
    return [by_id[place] for place in range(len(by_id))]


def _whole(number: Any) -> int:
    whole = int(number)
    if isinstance(number, bool) or (not isinstance(number, str) and whole != number):
        raise ValueError(f"{number!r} is not a whole number")
    return whole
