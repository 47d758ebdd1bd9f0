"""`Encoding`: the base class of all encodings, which turn raw counts into tokens."""

# Axes: B cells, T packed tokens.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike, NDArray

from scfm.data.batch import CellBatch
from scfm.data.compiled_encoder import encoder_module, encoder_threads
from scfm.data.counts import canonical_csr, row_totals
from scfm.encoding.config import EncodingConfig
from scfm.encoding.genes import GeneMap
from scfm.encoding.ragged import boundaries
from scfm.encoding.registry import ENCODINGS
from scfm.errors import VocabularyMismatchError
from scfm.vocab import Vocabulary

Backend = Literal["auto", "compiled", "numpy"]
CountBlocks = Iterable[tuple[sp.csr_matrix, NDArray[np.float64]]]


class Encoding(ABC):
    """Turns raw counts into packed tokens. It is immutable, and equal settings give equal tokens on every machine.

    Parameters
    ----------
    config
        Settings.
    vocabulary
        Token ids of genes and special tokens.
    medians
        Rank encoding only: median of each gene's non-zero normalized counts, by token id, shape (len(vocabulary),), float64.
        A gene without a median has NaN and is never encoded.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> encoding = scfm.encoding.make_encoding("rank", adata=adata)
    >>> genes = scfm.encoding.GeneMap.of(scfm.data.CountSource.of(adata), encoding.vocabulary)
    >>> cells = encoding.encode(adata.X[:2], genes)
    >>> cells.lengths_B.tolist() == (adata.X[:2] > 0).sum(1).ravel().tolist()[0]  # one token per expressed gene
    True
    """

    kind: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]  # values for fields of `EncodingConfig` that are None
    special_roles: ClassVar[tuple[str, ...]] = ()  # special tokens of each cell besides cls and eos
    has_values: ClassVar[bool] = True
    learns_medians: ClassVar[bool] = False
    is_ordered: ClassVar[bool] = False  # whether the order of tokens carries information

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            ENCODINGS.add(cls.kind, cls)

    def __init__(self, config: EncodingConfig, vocabulary: Vocabulary, *, medians: ArrayLike | None = None) -> None:
        if config.kind != self.kind:
            raise ValueError(f"`config.kind` is {config.kind!r}; {type(self).__name__} needs {self.kind!r}.")
        for role, wanted in (("cls", config.add_cls), ("eos", config.add_eos)):
            if wanted and vocabulary.special_id(role) is None:
                raise ValueError(
                    f"`add_{role}` is True, but the vocabulary has no {role!r} token (special: "
                    f"{dict(vocabulary.special)}). Set it to False, or build the vocabulary with this token."
                )
        self.config = config
        self.vocabulary = vocabulary
        self.medians: NDArray[np.float64] | None = None
        if medians is not None:
            self.medians = np.ascontiguousarray(medians, dtype=np.float64)
            if self.medians.shape != (len(vocabulary),):
                raise ValueError(
                    f"`medians` has shape {self.medians.shape}; it must hold one number per token, {len(vocabulary)}."
                )
            self.medians.flags.writeable = False

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.vocabulary.n_genes} genes by {self.vocabulary.id_type}, "
            f"context {self.config.context_length or 'unlimited'})"
        )

    @classmethod
    def fit(cls, blocks: CountBlocks, genes: GeneMap, config: EncodingConfig) -> Encoding:
        """Build the encoding from data. Only the rank encoding learns something (medians); the others need no data.

        Parameters
        ----------
        blocks
            Pairs of raw counts (CSR, shape (n, n_vars)) and total counts of these cells (shape (n,), float64).
        genes
            Token of each column.
        config
            Settings.
        """
        return cls(config, genes.vocabulary)

    def encode(
        self,
        counts: Any,
        genes: GeneMap,
        *,
        depth_B: ArrayLike | None = None,
        rng: np.random.Generator | None = None,
        backend: Backend = "auto",
    ) -> CellBatch:
        """Encode a block of cells.

        Parameters
        ----------
        counts
            Raw counts, shape (B, n_vars), dense or sparse.
        genes
            Token of each column.
        depth_B
            Total counts of each cell over all measured genes, shape (B,). None to sum the rows.
        rng
            Generator for training, where ties are broken at random and genes of long cells are sampled. With None, the same
            cell always gives the same tokens.
        backend
            "compiled", "numpy", or "auto" (compiled if it was built). Both give bitwise identical results.

        Returns
        -------
        CellBatch with `cell_index_B` from 0, `depth_B`, and int64 `cu_seqlens`. A cell without counts of genes of the
        vocabulary has only special tokens, or none.
        """
        if genes.vocabulary is not self.vocabulary and genes.vocabulary.fingerprint != self.vocabulary.fingerprint:
            raise VocabularyMismatchError(
                f"`genes` was made for {genes.vocabulary}, but the encoding has {self.vocabulary}. Map the genes with "
                "`GeneMap.of(counts, encoding.vocabulary)`."
            )
        block = canonical_csr(counts, name="`counts`")
        if block.shape[1] != genes.n_vars:
            raise ValueError(f"`counts` has {block.shape[1]} columns; `genes` maps {genes.n_vars}.")
        depths = row_totals(block) if depth_B is None else np.ascontiguousarray(depth_B, dtype=np.float64)
        if depths.shape != (block.shape[0],):
            raise ValueError(f"`depth_B` has shape {depths.shape}; `counts` has {block.shape[0]} cells.")
        draw = None if rng is None else int(rng.integers(2**63))
        compiled = _choose_backend(backend) if self._is_compiled(block, genes) else None
        if compiled is None:
            cu_seqlens, token_T, value_T = self._encode_numpy(block, genes, depths, draw)
        else:
            cu_seqlens, token_T, value_T = self._encode_compiled(compiled, block, genes, depths, draw)
        return CellBatch(
            gene_ids_T=torch.from_numpy(token_T),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            values_T=None if value_T is None else torch.from_numpy(value_T),
            cell_index_B=torch.arange(block.shape[0]),
            depth_B=torch.from_numpy(depths.astype(np.float32)),
        )

    def encodes(self, genes: GeneMap) -> NDArray[np.bool_]:
        """Whether each column can become a token, shape (n_vars,), bool: its gene is in the vocabulary, and has a median."""
        encodes = genes.token_ids >= 0
        return encodes if self.medians is None else encodes & ~np.isnan(self.medians[genes.token_ids])

    def replace(self, **changes: Any) -> Encoding:
        """Return a copy with some settings changed."""
        return type(self)(self.config.replace(**changes), self.vocabulary, medians=self.medians)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values; the vocabulary and `arrays` are saved separately."""
        return {"format_version": 1, **self.config.to_dict()}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Return the arrays that were learned from data, for saving."""
        return {} if self.medians is None else {"medians": self.medians}

    @abstractmethod
    def _encode_numpy(
        self, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        """Encode in NumPy; this code defines the encoding, and the compiled code gives the same result."""

    def _encode_compiled(
        self, compiled: ModuleType, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        """Encode with the compiled module; called only if `_is_compiled` returns True."""
        raise NotImplementedError

    def _is_compiled(self, block: sp.csr_matrix, genes: GeneMap) -> bool:
        """Whether the compiled module supports this encoding with these settings and data."""
        return False

    def _frame(self, compiled: ModuleType) -> Any:
        """Return the options of every compiled encoder: context length, special tokens, threads."""
        config, vocabulary = self.config, self.vocabulary
        return compiled.Frame(
            max_genes=len(vocabulary) if config.max_genes is None else config.max_genes,
            front=(vocabulary.cls_id, config.cls_value) if config.add_cls else None,
            back=(vocabulary.eos_id, config.eos_value) if config.add_eos else None,
            n_threads=encoder_threads(),
        )


Tokens = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32] | None]


def _choose_backend(backend: Backend) -> ModuleType | None:
    compiled = encoder_module()
    if backend == "compiled" and compiled is None:
        raise RuntimeError("`backend` is 'compiled', but scfm._host was not built or is turned off; see `scfm doctor`.")
    return None if backend == "numpy" else compiled


def add_special_tokens(
    cu_seqlens: NDArray[np.int64],
    token_T: NDArray[np.int32],
    value_T: NDArray[np.float32] | None,
    *,
    front: Mapping[int, NDArray[np.float32]],
    back: Mapping[int, NDArray[np.float32]],
) -> Tokens:
    """Add special tokens before and after the genes of every cell.

    Parameters
    ----------
    cu_seqlens, token_T, value_T
        Cells without special tokens.
    front, back
        Token id to the token's value in each cell, shape (B,), in the order of the tokens.
    """
    n_cells, extra = len(cu_seqlens) - 1, len(front) + len(back)
    if not extra:
        return cu_seqlens, token_T, value_T
    lengths_B = np.diff(cu_seqlens)
    framed = boundaries(lengths_B + extra)
    place_T = np.arange(len(token_T)) + np.repeat(np.arange(n_cells) * extra + len(front), lengths_B)
    tokens = np.empty(framed[-1], dtype=np.int32)
    tokens[place_T] = token_T
    values = None if value_T is None else np.empty(framed[-1], dtype=np.float32)
    if values is not None:
        values[place_T] = value_T
    places = [framed[:-1] + step for step in range(len(front))] + [
        framed[1:] - len(back) + step for step in range(len(back))
    ]
    for place_B, (token, value_B) in zip(places, [*front.items(), *back.items()]):
        tokens[place_B] = token
        if values is not None:
            values[place_B] = value_B
    return framed, tokens, values


def csr_arrays(block: sp.csr_matrix) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return row pointers (int64), indices and data for the compiled encoders; only pointers may be copied."""
    return block.indptr.astype(np.int64, copy=False), block.indices, block.data


def cls_and_eos(
    encoding: Encoding, n_cells: int
) -> tuple[dict[int, NDArray[np.float32]], dict[int, NDArray[np.float32]]]:
    """Return `front` and `back` of `add_special_tokens` for the `cls` and `eos` tokens of the configuration."""
    config, vocabulary = encoding.config, encoding.vocabulary
    front = {vocabulary.cls_id: config.cls_value} if config.add_cls else {}
    back = {vocabulary.eos_id: config.eos_value} if config.add_eos else {}
    return tuple(  # type: ignore[return-value]
        {token: np.full(n_cells, value, dtype=np.float32) for token, value in side.items()} for side in (front, back)
    )


def normalized(
    count_T: NDArray[np.float64], cell_T: NDArray[np.int64], total_B: NDArray[np.float64], target_sum: float | None
) -> NDArray[np.float64]:
    """Scale counts so that the total of each cell is `target_sum`; None leaves them unchanged."""
    return count_T if target_sum is None else count_T / total_B[cell_T] * target_sum
