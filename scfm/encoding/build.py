"""Build encodings from settings, a vocabulary and data, or from saved files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from scfm.data.source import CountSource
from scfm.encoding.base import Encoding
from scfm.encoding.config import EncodingConfig
from scfm.encoding.genes import GeneMap, several_columns
from scfm.encoding.registry import ENCODINGS
from scfm.errors import CountsError, ModelFileError, VocabularyMismatchError
from scfm.vocab import Vocabulary, strip_version


def make_encoding(
    kind: str | EncodingConfig,
    *,
    adata: Any = None,
    vocabulary: Vocabulary | None = None,
    medians: ArrayLike | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
) -> Encoding:
    """Make an encoding; a vocabulary or medians that are not given are learned from data.

    Parameters
    ----------
    kind
        "rank", "bin", "bucket" or "continuous" for the default settings of that kind, or an `EncodingConfig`.
    adata
        Raw counts, in any form that `CountSource.of` accepts. Needed only to learn a vocabulary or medians.
    vocabulary
        Token ids. None to build a vocabulary of the genes that at least one cell of `adata` expresses, in the order of the
        data, with `pad`, `mask` and the special tokens that the settings need.
    medians
        Rank encoding only: medians by token id, shape (len(vocabulary),). None to learn them from `adata`.
    layer, gene_key, depth_key
        Where `adata` holds counts, gene names and total counts; see `scfm.pp.encode`.

    Raises
    ------
    VocabularyMismatchError
        If genes are duplicated, or the genes of `adata` do not match `vocabulary`.
    CountsError
        If `adata` does not hold raw counts.

    Examples
    --------
    >>> import scfm.datasets, scfm.encoding
    >>> scfm.encoding.make_encoding("rank", adata=scfm.datasets.pbmc())
    RankEncoding(765 genes by symbol, context 2048)
    """
    config = kind if isinstance(kind, EncodingConfig) else EncodingConfig(kind=kind)
    encoding_class = ENCODINGS[config.kind]
    learns = encoding_class.learns_medians and medians is None
    if vocabulary is not None and not learns:
        return encoding_class(config, vocabulary, medians=medians)
    if adata is None:
        raise ValueError(
            "`adata` is needed to build the vocabulary or to learn medians. Pass `adata=`, or `vocabulary=` (and `medians=`)."
        )
    if vocabulary is None and medians is not None:
        raise ValueError("`medians` are indexed by token id. Pass the `vocabulary` that they belong to.")
    counts = CountSource.of(
        adata, layer=layer, gene_key=gene_key, depth_key=depth_key, usual_depth_key=config.depth_key
    )
    config = config.replace(depth_key=counts.depth_key or config.depth_key)
    if vocabulary is None:
        vocabulary = build_vocabulary(counts, config)
    genes = GeneMap.of(counts, vocabulary, duplicates=config.duplicates)
    return encoding_class.fit(((block, depth_B) for _, block, depth_B in counts.blocks()), genes, config)


def build_vocabulary(counts: CountSource, config: EncodingConfig) -> Vocabulary:
    """Make a vocabulary of the genes that are expressed at least once, in the order of the data.

    Genes without a name are omitted, and versions are removed from Ensembl ids.

    Parameters
    ----------
    counts
        Raw counts.
    config
        Settings of the encoding, which determine the special tokens.

    Raises
    ------
    CountsError
        If all counts are zero.
    VocabularyMismatchError
        If genes are duplicated and `config.duplicates` is "error".

    Examples
    --------
    >>> import scfm
    >>> counts = scfm.data.CountSource.of(scfm.datasets.pbmc())
    >>> vocabulary = scfm.encoding.build_vocabulary(counts, scfm.EncodingConfig(kind="bin"))
    >>> vocabulary.n_genes, list(vocabulary.special)
    (765, ['pad', 'mask', 'cls'])
    """
    names, source = counts.names()
    is_expressed = np.zeros(counts.n_vars, dtype=bool)
    for _, block, _ in counts.blocks():
        is_expressed[block.indices] = True
    if not is_expressed.any():
        raise CountsError(
            f"All counts of {counts.name} are zero ({counts.n_obs} cells x {counts.n_vars} genes). Load the counts again."
        )
    genes = [strip_version(name) if name is not None and seen else None for name, seen in zip(names, is_expressed)]
    distinct = list(dict.fromkeys(gene for gene in genes if gene is not None))
    if not distinct:
        raise VocabularyMismatchError(
            f"None of the {counts.n_vars} genes has a name in {source}. Pass another `gene_key`."
        )
    if len(distinct) < sum(gene is not None for gene in genes) and config.duplicates == "error":
        raise VocabularyMismatchError(several_columns(names, [-1 if gene is None else gene for gene in genes], source))
    return Vocabulary.from_genes(distinct, special=["pad", "mask", *config.special_roles])


def encoding_from_dict(
    content: Mapping[str, Any], vocabulary: Vocabulary, arrays: Mapping[str, ArrayLike] | None = None
) -> Encoding:
    """Build an encoding from the results of `Encoding.to_dict` and `Encoding.arrays`, and its vocabulary.

    Parameters
    ----------
    content
        Settings, as `Encoding.to_dict` returns them.
    vocabulary
        The vocabulary that the encoding was made with.
    arrays
        Arrays learned from data, as `Encoding.arrays` returns them; only rank encodings have some.

    Raises
    ------
    ModelFileError
        If the settings have another format version, or do not match the vocabulary.

    Examples
    --------
    >>> import scfm
    >>> encoding = scfm.encoding.make_encoding("rank", adata=scfm.datasets.pbmc())
    >>> scfm.encoding.encoding_from_dict(encoding.to_dict(), encoding.vocabulary, encoding.arrays())
    RankEncoding(765 genes by symbol, context 2048)
    """
    content = dict(content)
    if (version := content.pop("format_version", None)) != 1:
        raise ModelFileError(f"The encoding has format version {version!r}; this scfm reads 1. Update scfm.")
    try:
        config = EncodingConfig.from_dict(content)
        return ENCODINGS[config.kind](config, vocabulary, medians=(arrays or {}).get("medians"))
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"The saved encoding cannot be used: {error}") from error
