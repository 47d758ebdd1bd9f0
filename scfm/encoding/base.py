"""`Encoding`: the protocol that all four ways of turning counts into tokens share."""

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
from scfm.data.counts import canonical_csr, row_totals
from scfm.data.host import host_module, host_threads
from scfm.encoding.config import EncodingConfig
from scfm.encoding.genes import GeneMap
from scfm.encoding.ragged import boundaries
from scfm.encoding.registry import ENCODINGS
from scfm.errors import VocabularyMismatchError
from scfm.vocab import Vocabulary

Backend = Literal["auto", "compiled", "numpy"]
CountBlocks = Iterable[tuple[sp.csr_matrix, NDArray[np.float64]]]


class Encoding(ABC):
    """Turns raw counts into packed tokens. Immutable; equal settings give equal tokens on every machine.

    Parameters
    ----------
    config
        Every setting.
    vocabulary
        Token ids of genes and specials.
    medians
        Rank only: non-zero median of each gene's normalized counts by token id, shape (len(vocabulary),), float64;
        NaN for tokens that have none, which are then never encoded.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()
    >>> encoding = scfm.encoding.make_encoding("rank", adata=adata)
    >>> genes = scfm.encoding.GeneMap.of(scfm.data.CountSource.of(adata), encoding.vocabulary)
    >>> cells = encoding.encode(adata.X[:2], genes)
    >>> cells.lengths_B.tolist() == (adata.X[:2] > 0).sum(1).ravel().tolist()[0]  # a token for each expressed gene
    True
    """

    kind: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]  # of the fields of `EncodingConfig` that are None
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
                    f"{dict(vocabulary.special)}). Set it to False, or build the vocabulary with one."
                )
        self.config = config
        self.vocabulary = vocabulary
        self.medians: NDArray[np.float64] | None = None
        if medians is not None:
            self.medians = np.ascontiguousarray(medians, dtype=np.float64)
            if self.medians.shape != (len(vocabulary),):
                raise ValueError(f"`medians` has shape {self.medians.shape}; one a token is needed, {len(vocabulary)}.")
            self.medians.flags.writeable = False

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.vocabulary.n_genes} genes by {self.vocabulary.id_type}, "
            f"context {self.config.context_length or 'unlimited'})"
        )

    @classmethod
    def fit(cls, blocks: CountBlocks, genes: GeneMap, config: EncodingConfig) -> Encoding:
        """Build the encoding from data. Only rank learns anything; the others take the vocabulary as it is.

        Parameters
        ----------
        blocks
            Pairs of raw counts (CSR, (n, n_vars)) and total counts of their cells ((n,), float64).
        genes
            Token of each column.
        config
            Every setting.
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
            Total counts of each cell over all genes measured, shape (B,); None to sum the rows.
        rng
            Given in training: spreads ties and samples long cells at random. None: the same cell always gives the
            same tokens.
        backend
            "compiled", "numpy", or "auto" for the compiled one where it was built. Both give the same bits.

        Returns
        -------
        CellBatch with `cell_index_B` from 0, `depth_B`, and int64 `cu_seqlens`. Cells without a known gene have only
        special tokens, or none.
        """
        if genes.vocabulary is not self.vocabulary and genes.vocabulary.fingerprint != self.vocabulary.fingerprint:
            raise VocabularyMismatchError(
                f"`genes` maps to another vocabulary ({genes.vocabulary}) than the encoding has ({self.vocabulary}). Map the "
                "genes with `GeneMap.of(counts, encoding.vocabulary)`."
            )
        block = canonical_csr(counts, name="`counts`")
        if block.shape[1] != genes.n_vars:
            raise ValueError(f"`counts` has {block.shape[1]} columns; `genes` maps {genes.n_vars}.")
        depths = row_totals(block) if depth_B is None else np.ascontiguousarray(depth_B, dtype=np.float64)
        if depths.shape != (block.shape[0],):
            raise ValueError(f"`depth_B` has shape {depths.shape}; `counts` has {block.shape[0]} cells.")
        draw = None if rng is None else int(rng.integers(2**63))
        host = _choose_backend(backend) if self._compiled_serves(block, genes) else None
        if host is None:
            cu_seqlens, token_T, value_T = self._encode_numpy(block, genes, depths, draw)
        else:
            cu_seqlens, token_T, value_T = self._encode_compiled(host, block, genes, depths, draw)
        return CellBatch(
            gene_ids_T=torch.from_numpy(token_T),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            values_T=None if value_T is None else torch.from_numpy(value_T),
            cell_index_B=torch.arange(block.shape[0]),
            depth_B=torch.from_numpy(depths.astype(np.float32)),
        )

    def encodes(self, genes: GeneMap) -> NDArray[np.bool_]:
        """Which columns can become tokens: those of genes of the vocabulary, for rank with a median; shape (n_vars,)."""
        encodes = genes.token_ids >= 0
        return encodes if self.medians is None else encodes & ~np.isnan(self.medians[genes.token_ids])

    def replace(self, **changes: Any) -> Encoding:
        """Return the same encoding with some settings changed."""
        return type(self)(self.config.replace(**changes), self.vocabulary, medians=self.medians)

    def to_dict(self) -> dict[str, Any]:
        """Settings, JSON-able; the vocabulary and `arrays` are saved separately."""
        return {"format_version": 1, **self.config.to_dict()}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """What was learned from data, for saving next to `to_dict`."""
        return {} if self.medians is None else {"medians": self.medians}

    @abstractmethod
    def _encode_numpy(
        self, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        """Encode in NumPy: the plain statement of the rules."""

    def _encode_compiled(
        self, host: ModuleType, block: sp.csr_matrix, genes: GeneMap, depth_B: NDArray[np.float64], draw: int | None
    ) -> Tokens:
        """Encode with the compiled module; only called where `_compiled_serves`."""
        raise NotImplementedError

    def _compiled_serves(self, block: sp.csr_matrix, genes: GeneMap) -> bool:
        """Whether the compiled module has this encoding, with these settings, for these data."""
        return False

    def _frame(self, host: ModuleType) -> Any:
        """What every compiled encoder is told: context, special tokens, threads."""
        config, vocabulary = self.config, self.vocabulary
        return host.Frame(
            max_genes=len(vocabulary) if config.max_genes is None else config.max_genes,
            front=(vocabulary.cls_id, config.cls_value) if config.add_cls else None,
            back=(vocabulary.eos_id, config.eos_value) if config.add_eos else None,
            n_threads=host_threads(),
        )


Tokens = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32] | None]


def _choose_backend(backend: Backend) -> ModuleType | None:
    host = host_module()
    if backend == "compiled" and host is None:
        raise RuntimeError("`backend` is 'compiled', but scfm._host was not built or is turned off; see `scfm doctor`.")
    return None if backend == "numpy" else host


def add_specials(
    cu_seqlens: NDArray[np.int64],
    token_T: NDArray[np.int32],
    value_T: NDArray[np.float32] | None,
    *,
    front: Mapping[int, NDArray[np.float32]],
    back: Mapping[int, NDArray[np.float32]],
) -> Tokens:
    """Put special tokens before and after every cell.

    Parameters
    ----------
    cu_seqlens, token_T, value_T
        Cells without specials.
    front, back
        Token id to its value in each cell, shape (B,), in the order wanted.
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
    """Row pointers (int64), indices and data as the compiled encoders take them; copies pointers only."""
    return block.indptr.astype(np.int64, copy=False), block.indices, block.data


def cls_and_eos(
    encoding: Encoding, n_cells: int
) -> tuple[dict[int, NDArray[np.float32]], dict[int, NDArray[np.float32]]]:
    """Values of the `cls` and `eos` tokens that the config asks for, as `front` and `back` of `add_specials`."""
    config, vocabulary = encoding.config, encoding.vocabulary
    front = {vocabulary.cls_id: config.cls_value} if config.add_cls else {}
    back = {vocabulary.eos_id: config.eos_value} if config.add_eos else {}
    return tuple(  # type: ignore[return-value]
        {token: np.full(n_cells, value, dtype=np.float32) for token, value in side.items()} for side in (front, back)
    )


def normalized(
    count_T: NDArray[np.float64], cell_T: NDArray[np.int64], total_B: NDArray[np.float64], target_sum: float | None
) -> NDArray[np.float64]:
    """Counts scaled so that a cell's total becomes `target_sum`; unchanged where that is None."""
    return count_T if target_sum is None else count_T / total_B[cell_T] * target_sum
