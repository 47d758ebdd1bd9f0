"""`Vocabulary`: the table of gene names and token ids.

Names are compared exactly. The case of symbols is never changed, because upper case turns the symbols of three quarters of
the genes of mouse data into symbols of human genes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scfm.errors import ModelFileError, VocabularyMismatchError

IdType = Literal["symbol", "ensembl", "other"]

FORMAT_VERSION = 1
DEFAULT_SPECIALS = {"pad": "<pad>", "mask": "<mask>", "cls": "<cls>", "eos": "<eos>"}
# In tables of genes: columns of names (or the index), and the column of their symbols.
SYMBOL_COLUMNS = {
    "gene": "symbol",
    "affected": "affected_symbol",
    "source": "source_symbol",
    "target": "target_symbol",
}

_ENSEMBL_SPECIES = {"ENSG": "human", "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSSSCG": "pig",
                    "ENSMMUG": "macaque", "ENSMFAG": "macaque", "ENSPTRG": "chimpanzee"}  # fmt: skip

_ENSEMBL = re.compile(r"ENS[A-Z]{0,5}G\d{11}(\.\d+)?")
_VERSION = re.compile(r"\.\d+$")


def is_ensembl(name: str) -> bool:
    """Whether `name` has the form of an Ensembl gene id, with or without a version."""
    return _ENSEMBL.fullmatch(name) is not None


def strip_version(name: str) -> str:
    """Remove the version from an Ensembl gene id; other names are returned unchanged (RP11-34P13.7 is a symbol)."""
    return _VERSION.sub("", name) if is_ensembl(name) else name


def guess_id_type(names: Sequence[str | None]) -> IdType:
    """Guess the kind of most of `names` from a sample of 2,000 names."""
    sample = [name for name in names[:: max(1, len(names) // 2000)] if name is not None]
    if not sample:
        return "other"
    ensembl = sum(map(is_ensembl, sample)) / len(sample)
    if ensembl > 0.5:
        return "ensembl"
    numeric = sum(name.isdigit() for name in sample) / len(sample)
    return "other" if numeric > 0.5 else "symbol"


def guess_species(names: Sequence[str | None]) -> str:
    """Guess a species from Ensembl prefixes or the case of symbols (GAPDH in human, Gapdh in mouse, gapdh in zebrafish)."""
    sample = [name for name in names[:: max(1, len(names) // 2000)] if name is not None]
    if guess_id_type(sample) == "ensembl":
        prefixes = [re.match(r"[A-Z]+", name) for name in sample if is_ensembl(name)]
        (prefix, _), *_ = Counter(match.group() for match in prefixes if match).most_common(1)
        return _ENSEMBL_SPECIES.get(prefix, "unknown")
    forms = {"human": r"[A-Z][A-Z0-9.orf-]*", "mouse": r"[A-Z][a-z][a-z0-9-]*", "zebrafish": r"[a-z][a-z0-9.:-]*"}
    lettered = [name for name in sample if re.match(r"[A-Za-z]{2}", name)]
    stems = {name.rstrip("0123456789") for name in lettered}
    if len(stems) < len(lettered) / 10:  # gene1, gene2, ...: numbers, not names
        return "unknown"
    for species, form in forms.items():
        if lettered and sum(re.fullmatch(form, name) is not None for name in lettered) / len(lettered) > 0.6:
            return species
    return "unknown"


class Vocabulary:
    """A list of tokens, whose positions are their ids. It is immutable.

    ``name in vocabulary`` is True if `name` is exactly a token. `token_ids`, `find` and `require` also find genes by their
    aliases, and ignore the versions of Ensembl ids.

    Parameters
    ----------
    tokens
        All tokens (genes and special tokens) in the order of their ids.
    special
        Special tokens by role, such as ``{"pad": "<pad>", "mask": "<mask>"}``; each must be in `tokens`. All other tokens
        are genes.
    id_type
        Kind of the gene names: "symbol", "ensembl" or "other". None to guess it from the names.
    aliases
        Other names of genes, as a mapping of alias to token. Used only for names that are not tokens.

    Raises
    ------
    ValueError
        If a token occurs twice, a special token or the token of an alias is not among the tokens, or `id_type` is unknown.

    Examples
    --------
    >>> import scfm
    >>> vocabulary = scfm.Vocabulary.from_genes(["CD74", "CST3"], special=("pad", "mask"))
    >>> vocabulary.token_ids(["CST3", "no such gene"]).tolist()
    [3, -1]
    >>> vocabulary.mask_id, "CD74" in vocabulary
    (1, True)
    """

    def __init__(
        self,
        tokens: Sequence[str],
        *,
        special: Mapping[str, str] = MappingProxyType({}),
        id_type: IdType | None = None,
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.tokens: tuple[str, ...] = tuple(map(str, tokens))
        self._ids = {token: position for position, token in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            twice = next(token for position, token in enumerate(self.tokens) if self._ids[token] != position)
            raise ValueError(f"Token {twice!r} occurs more than once; a vocabulary needs distinct tokens.")
        self.special: Mapping[str, str] = MappingProxyType(dict(special))
        for role, token in self.special.items():
            if token not in self._ids:
                raise ValueError(f"Special token {token!r} (role {role!r}) is not among the {len(self.tokens)} tokens.")
        self.aliases: Mapping[str, str] = MappingProxyType(dict(aliases))
        for alias, token in self.aliases.items():
            if token not in self._ids:
                raise ValueError(f"Alias {alias!r} is for {token!r}, which is not a token. Remove this alias.")
        self.id_type: IdType = id_type or guess_id_type(self.genes)
        if self.id_type not in get_args(IdType):
            raise ValueError(f"`id_type` is {id_type!r}; it must be one of {', '.join(get_args(IdType))}.")

    @classmethod
    def from_genes(
        cls,
        names: Iterable[str],
        *,
        special: Sequence[str] = ("pad", "mask", "cls", "eos"),
        id_type: IdType | None = None,
    ) -> Vocabulary:
        """Build a vocabulary of the given special tokens, followed by the given genes, in their order."""
        specials = {role: DEFAULT_SPECIALS.get(role, f"<{role}>") for role in special}
        return cls([*specials.values(), *names], special=specials, id_type=id_type)

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary.from_dict, (self.to_dict(),)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Vocabulary({self.n_genes} genes by {self.id_type}, special: {', '.join(self.special) or 'none'})"

    @property
    def n_genes(self) -> int:
        return len(self.tokens) - len(set(self.special.values()))

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """All tokens that are genes, in the order of their ids."""
        specials = set(self.special.values())
        return tuple(token for token in self.tokens if token not in specials)

    @cached_property
    def gene_ids(self) -> NDArray[np.int32]:
        """Ids of the tokens that are genes, ascending, shape (n_genes,), int32."""
        specials = set(self.special.values())
        return np.array(
            [position for position, token in enumerate(self.tokens) if token not in specials], dtype=np.int32
        )

    @cached_property
    def species(self) -> str:
        """Species of the genes, guessed from their names; "unknown" if they do not show it."""
        return guess_species(self.genes)

    def special_id(self, role: str) -> int | None:
        """Return the id of the special token with this role; None if there is none."""
        token = self.special.get(role)
        return None if token is None else self._ids[token]

    @property
    def pad_id(self) -> int | None:
        return self.special_id("pad")

    @property
    def mask_id(self) -> int | None:
        return self.special_id("mask")

    @property
    def cls_id(self) -> int | None:
        return self.special_id("cls")

    @property
    def eos_id(self) -> int | None:
        return self.special_id("eos")

    def token_ids(self, names: Iterable[str]) -> NDArray[np.int32]:
        """Return the token id of each name, shape (n,), int32; -1 for a name that is not found.

        A name is first looked up as it is, then as an alias, then without the version of an Ensembl id: ENSG00000019582.14
        finds the token ENSG00000019582, and the reverse.
        """
        return self._look_up(list(names))[0]

    def _look_up(self, names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the token id of each name, and the indices of the names that are neither a token nor an alias."""
        ids = self._as_written(names)
        rest = np.flatnonzero(ids < 0)
        bare = [strip_version(names[index]) for index in rest.tolist()]
        found = self._as_written(bare)
        ids[rest] = np.where(found >= 0, found, [self._unversioned.get(name, -1) for name in bare])
        return ids, rest

    def _as_written(self, names: Sequence[str]) -> NDArray[np.int32]:
        ids, aliases = self._ids, self.aliases
        found = [ids.get(name, -1) for name in names]
        if aliases:
            found = [
                ids.get(aliases.get(name, ""), -1) if position < 0 else position for name, position in zip(names, found)
            ]
        return np.array(found, dtype=np.int32)

    def find(self, names: Sequence[str | None]) -> tuple[NDArray[np.int32], int]:
        """Look up genes as `token_ids` does; special tokens are not found.

        Parameters
        ----------
        names
            Names of genes; None for a gene without a name.

        Returns
        -------
        Token ids, shape (n,), int32, -1 for genes that are not in the vocabulary; and the number of names that were found
        only without their version.
        """
        given = ["" if name is None else name for name in names]
        ids, rest = self._look_up(given)
        is_gene_V = np.zeros(len(self) + 1, dtype=bool)  # the last entry is that of id -1
        is_gene_V[self.gene_ids] = True
        ids[np.array([not name for name in given], dtype=bool) | ~is_gene_V[ids]] = -1
        return ids, int((ids[rest] >= 0).sum())

    @cached_property
    def _unversioned(self) -> dict[str, int]:
        """Token ids by Ensembl id without its version; ids that occur with several versions are omitted."""
        ids: dict[str, int] = {}
        twice = set()
        for token, position in self._ids.items():
            bare = strip_version(token)
            if bare != token:
                twice |= {bare} & ids.keys()
                ids[bare] = position
        return {bare: position for bare, position in ids.items() if bare not in twice}

    @cached_property
    def _symbols(self) -> dict[str, str]:
        """Symbol of each token that has one: its first alias that is not an Ensembl id."""
        symbols: dict[str, str] = {}
        for alias, token in self.aliases.items():
            if not is_ensembl(alias):
                symbols.setdefault(token, alias)
        return symbols

    def symbols(self, names: Sequence[str]) -> list[str] | None:
        """Return the symbol of each gene, an empty text for a gene without one, or None if the vocabulary has no symbols.

        Only vocabularies of Ensembl ids have symbols: their aliases that are not Ensembl ids.
        """
        if self.id_type != "ensembl" or not self._symbols:
            return None
        ids = self.find(names)[0].tolist()
        return ["" if index < 0 else self._symbols.get(self.tokens[index], "") for index in ids]

    def require(self, names: Sequence[str]) -> NDArray[np.int32]:
        """Look up genes that must be in the vocabulary, as `find` does. Token ids, shape (n,), int32.

        Raises
        ------
        VocabularyMismatchError
            If a name is not in the vocabulary, or is a special token; the message says which.
        """
        ids, _ = self.find(names)
        if (ids < 0).any():
            missing = [name for name, token_id in zip(names, ids) if token_id < 0]
            raise VocabularyMismatchError(
                f"{len(missing)} of {len(names)} genes are not in the vocabulary: {', '.join(map(repr, missing[:5]))}. "
                f"It has {self.n_genes} genes by {self.id_type}, such as {self.genes[0]!r}; names are case-sensitive."
            )
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of tokens and roles in order, in hexadecimal. If it is equal, token ids are interchangeable."""
        content = json.dumps([self.tokens, sorted(self.special.items())], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "id_type": self.id_type,
            "special": dict(self.special),
            "tokens": list(self.tokens),
            "aliases": dict(self.aliases),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Vocabulary:
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelFileError(
                f"The vocabulary has format version {version!r}; this scfm reads {FORMAT_VERSION}. "
                "Update scfm, or read a published vocabulary with `scfm.encoding.read_vocabulary`."
            )
        if missing := [name for name in ("tokens", "special", "id_type") if name not in content]:
            raise ModelFileError(f"The vocabulary has no entry {missing[0]!r}; it is damaged. Save the model again.")
        return cls(
            content["tokens"],
            special=content["special"],
            id_type=content["id_type"],
            aliases=content.get("aliases", {}),
        )

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Vocabulary:
        """Read what `to_json` wrote.

        Raises
        ------
        ModelFileError
            If the file is not JSON or not a vocabulary of this format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(content)
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{str(path)!r} is not a vocabulary written by scfm ({error}).") from error
