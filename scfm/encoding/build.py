"""Makes encodings: from settings, vocabulary and data, and from what was saved."""

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
    """Make an encoding, learning from data what is not given.

    Parameters
    ----------
    kind
        "rank", "bin", "bucket" or "continuous" with that family's settings, or all settings.
    adata
        Raw counts, in any form that `CountSource.of` takes; only needed for what is not given.
    vocabulary
        Token ids; None to build it of the genes that at least one cell of `adata` expresses, in the order of the data,
        with `pad`, `mask` and the special tokens that the settings ask for.
    medians
        Rank only: by token id, shape (len(vocabulary),); None to learn them from `adata`.
    layer, gene_key, depth_key
        Where `adata` keeps counts, gene names and total counts; see `scfm.pp.encode`.

    Raises
    ------
    VocabularyMismatchError
        If genes are duplicated, or those of `adata` do not fit `vocabulary`.
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
            "`adata` is needed to build the vocabulary or to learn medians; pass it, or pass both of them."
        )
    if vocabulary is None and medians is not None:
        raise ValueError("`medians` go by token id, so they need their `vocabulary`.")
    counts = CountSource.of(adata, layer=layer, gene_key=gene_key, depth_key=depth_key)
    if vocabulary is None:
        vocabulary = build_vocabulary(counts, config)
    genes = GeneMap.of(counts, vocabulary, duplicates=config.duplicates)
    return encoding_class.fit(((block, depth_B) for _, block, depth_B in counts.blocks()), genes, config)


def build_vocabulary(counts: CountSource, config: EncodingConfig) -> Vocabulary:
    """Make a vocabulary of the genes that are expressed at least once, in the order of the data.

    Genes without a name are left out, and Ensembl ids lose their versions.

    Parameters
    ----------
    counts
        Raw counts.
    config
        Settings of the encoding, which say what special tokens it needs.

    Raises
    ------
    CountsError
        If there are no counts at all.
    VocabularyMismatchError
        If genes are duplicated and the settings do not say to sum them.

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
        raise CountsError(f"{counts.name} holds no counts at all ({counts.n_obs} cells x {counts.n_vars} genes).")
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
    """Rebuild an encoding from `Encoding.to_dict`, its vocabulary, and `Encoding.arrays`.

    Parameters
    ----------
    content
        Settings, as `Encoding.to_dict` returns them.
    vocabulary
        The vocabulary that the encoding was made with.
    arrays
        What it learned from data, as `Encoding.arrays` returns it; for rank encodings.

    Raises
    ------
    ModelFileError
        If the settings have another format version, or do not fit.

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
