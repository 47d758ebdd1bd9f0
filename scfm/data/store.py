"""`TokenStore`: encoded cells on disk, for many epochs over the same tokens.

A store is a folder of `.npy` files, which are mapped into memory, and one JSON file.
"""

# Axes: B cells, T packed tokens.

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch.utils.data import Dataset

from scfm._files import atomic_write
from scfm.data.batch import CellBatch
from scfm.errors import ModelFileError, VocabularyMismatchError
from scfm.vocab import Vocabulary

FORMAT_VERSION = 1


class _Encoding(Protocol):
    """The attributes of an encoding that a store records."""

    @property
    def config(self) -> Any: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def to_dict(self) -> dict[str, Any]: ...


class TokenStore(Dataset[CellBatch]):
    """Encoded cells on disk; ``store[rows]`` is a `CellBatch`.

    A `torch.utils.data.DataLoader` of a store, with `TokenBudgetSampler` as its sampler and ``batch_size=None``, yields
    shuffled batches within a token budget, for any number of workers and ranks.

    Parameters
    ----------
    path
        A folder that `write` has written.

    Raises
    ------
    ModelFileError
        If the folder is not a token store of this format, or one of its files is cut short.

    Examples
    --------
    >>> import scfm
    >>> from scfm.data import TokenStore
    >>> adata = scfm.datasets.pbmc()
    >>> encoding = scfm.encoding.make_encoding("rank", adata=adata)
    >>> TokenStore.write("tokens", [scfm.pp.encode(adata, encoding)], encoding)
    >>> store = TokenStore("tokens")
    >>> len(store), store[[5, 2]].n_cells
    (700, 2)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.info: dict[str, Any] = json.loads((self.path / "info.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as error:
            raise ModelFileError(
                f"{str(path)!r} is not a token store ({error}). `scfm tokenize` writes one."
            ) from error
        if self.info.get("format_version") != FORMAT_VERSION:
            raise ModelFileError(
                f"The token store has format version {self.info.get('format_version')!r}; this scfm reads "
                f"{FORMAT_VERSION}. Update scfm, or write the store again."
            )
        self._tokens = self._map("gene_ids", self.info["n_tokens"])
        self._values = self._map("values", self.info["n_tokens"]) if self.info["has_values"] else None
        self._ends = self._map("cu_seqlens", self.info["n_cells"] + 1)
        self._depth = self._map("depth", self.info["n_cells"])

    def _map(self, name: str, size: int) -> NDArray[Any]:
        try:
            array = np.load(self.path / f"{name}.npy", mmap_mode="r" if size else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{name}.npy of the token store {str(self.path)!r} cannot be read: {error}") from error
        if array.shape != (size,):
            raise ModelFileError(
                f"{name}.npy of {str(self.path)!r} has shape {array.shape}, but {size} numbers were written. Copy or write "
                "the store again."
            )
        return array

    def __len__(self) -> int:
        return int(self.info["n_cells"])

    @property
    def lengths_B(self) -> NDArray[np.int64]:
        """Number of tokens of each cell, shape (n_cells,), int64, as `TokenBudgetSampler` needs it."""
        return np.diff(self._ends)

    def __getitem__(self, rows: int | Sequence[int] | ArrayLike) -> CellBatch:
        """Read cells, in the order of `rows`, as a batch with int32 boundaries; `cell_index_B` holds `rows`."""
        rows_B = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        spans = [slice(int(self._ends[row]), int(self._ends[row + 1])) for row in rows_B]
        cu_seqlens = np.zeros(len(rows_B) + 1, dtype=np.int32)
        cu_seqlens[1:] = np.cumsum([span.stop - span.start for span in spans])

        def gather(source: NDArray[Any], dtype: DTypeLike) -> torch.Tensor:
            parts = [source[span] for span in spans]
            return torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype))

        return CellBatch(
            gene_ids_T=gather(self._tokens, np.int32),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            values_T=None if self._values is None else gather(self._values, np.float32),
            cell_index_B=torch.from_numpy(rows_B),
            depth_B=torch.from_numpy(self._depth[rows_B].astype(np.float32)),
        )

    def require_encoding(self, encoding: _Encoding) -> None:
        """Raise `VocabularyMismatchError` unless the tokens were made with the same settings and vocabulary."""
        if self.info["vocabulary"] != encoding.vocabulary.fingerprint or self.info["encoding"] != encoding.to_dict():
            raise VocabularyMismatchError(
                f"The tokens in {str(self.path)!r} were made with another vocabulary or other settings than those of the "
                "model. Write the store again with the encoding of the model."
            )

    @staticmethod
    def write(path: str | Path, batches: Iterable[CellBatch], encoding: _Encoding, *, overwrite: bool = False) -> None:
        """Write encoded cells, batch by batch, in the given order.

        The folder appears at `path` when it is complete. One batch is in memory at a time.

        Parameters
        ----------
        path
            The folder to write.
        batches
            Encoded cells, such as ``CellStream(..., shuffle=False)`` or ``[scfm.pp.encode(adata, encoding)]``.
        encoding
            Encoding of the cells. It is recorded, so that models with another encoding refuse the store.
        overwrite
            Whether to replace an existing store.

        Raises
        ------
        FileExistsError
            If the folder exists and `overwrite` is False.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{str(path)!r} exists; choose another name, or pass `overwrite=True`.")
        if path.exists() and not (path / "info.json").exists():
            raise FileExistsError(
                f"{str(path)!r} exists and is not a token store, so it is not replaced. Choose another name."
            )
        with atomic_write(path) as temporary_path:
            temporary_path.mkdir()
            _write_files(temporary_path, batches, encoding)


def _write_files(folder: Path, batches: Iterable[CellBatch], encoding: _Encoding) -> None:
    has_values = encoding.config.has_values
    small = len(encoding.vocabulary) <= np.iinfo(np.uint16).max + 1
    ends = [np.zeros(1, dtype=np.int64)]
    depths = []
    total = 0
    with ExitStack() as files:
        tokens = files.enter_context(closing(_NpyWriter(folder / "gene_ids.npy", np.uint16 if small else np.int32)))
        values = files.enter_context(closing(_NpyWriter(folder / "values.npy", np.float32))) if has_values else None
        for batch in batches:
            ends.append(batch.cu_seqlens[1:].numpy().astype(np.int64) + total)
            total += batch.n_tokens
            depths.append(np.full(batch.n_cells, np.nan) if batch.depth_B is None else batch.depth_B.numpy())
            tokens.append(batch.gene_ids_T.numpy())
            if values is not None and batch.values_T is not None:
                values.append(batch.values_T.numpy())
    cu_seqlens = np.concatenate(ends)
    np.save(folder / "cu_seqlens.npy", cu_seqlens)
    np.save(folder / "depth.npy", np.concatenate([*depths, np.zeros(0)]).astype(np.float32))
    info = {
        "format_version": FORMAT_VERSION,
        "n_cells": len(cu_seqlens) - 1,
        "n_tokens": total,
        "has_values": has_values,
        "vocabulary": encoding.vocabulary.fingerprint,
        "encoding": encoding.to_dict(),
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


class _NpyWriter:
    """Writes a one-dimensional `.npy` file whose length is known only at the end."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._size = 0
        self._header()

    def append(self, array: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(array, dtype=self._dtype).tobytes())
        self._size += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        # NumPy pads headers to a multiple of 64 bytes; here they have 128 bytes for every length of the array.
        shape = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._size,)}
        np.lib.format.write_array_header_1_0(self._file, shape)
