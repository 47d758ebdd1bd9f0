"""Ranges of an uncompressed HDF5 dataset, read straight from the file.

HDF5 takes a global lock, and copies each chunk twice. Where neither compression nor conversion stands between the file and the
numbers, it only says where the chunks lie; the system then reads them into place, from several threads at once.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RawDataset:
    """A one-dimensional dataset as a file of its own and the places of its chunks in it.

    Parameters
    ----------
    path
        The file.
    starts
        Byte in the file at which each chunk starts, in the order of the elements, shape (n_chunks,), int64.
    chunk
        Elements of a chunk; the last one may hold fewer that count.
    size, dtype
        Elements of the dataset, and what they are.
    """

    def __init__(self, path: str, starts: NDArray[np.int64], *, chunk: int, size: int, dtype: np.dtype[Any]) -> None:
        self._chunk = chunk
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.shape, self.dtype = (size,), dtype
        # Chunks that lie end to end are one run, read by one call: `_runs[i]` chunks go before run i, and it starts
        # at byte `_run_starts[i]`.
        apart = np.diff(starts) != chunk * dtype.itemsize
        self._runs = np.concatenate([[0], np.flatnonzero(apart) + 1])
        self._run_starts = starts[self._runs]

    @classmethod
    def of(cls, dataset: Any) -> RawDataset | None:
        """Read off an `h5py.Dataset` where it lies; None where its bytes are not its numbers, or not all there."""
        import h5py

        creation, dtype, path = dataset.id.get_create_plist(), dataset.dtype, dataset.file.filename
        plain = (
            dataset.ndim == 1 and dataset.size and creation.get_nfilters() == 0 and creation.get_external_count() == 0
        )
        if not (plain and dtype.kind in "biuf" and dtype.isnative and dataset.file.userblock_size == 0):
            return None
        if dtype.kind == "b" or not hasattr(os, "preadv"):  # booleans are enumerations, which h5py converts
            return None
        layout = creation.get_layout()
        if layout == h5py.h5d.CONTIGUOUS and (start := dataset.id.get_offset()) is not None:
            return cls(path, np.array([start]), chunk=dataset.size, size=dataset.size, dtype=dtype)
        if layout != h5py.h5d.CHUNKED:
            return None
        starts = np.full(-(-dataset.size // dataset.chunks[0]), -1, dtype=np.int64)

        def note(info: Any) -> None:
            starts[info.chunk_offset[0] // dataset.chunks[0]] = info.byte_offset

        dataset.id.chunk_iter(note)
        if (starts < 0).any():  # a chunk that was never written holds the fill value
            return None
        return cls(path, starts, chunk=dataset.chunks[0], size=dataset.size, dtype=dtype)

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """Read elements start..stop; reads at the same time do not wait for each other."""
        start, stop, _ = span.indices(self.shape[0])
        values = np.empty(max(stop - start, 0), dtype=self.dtype)
        content = memoryview(values.view(np.uint8))  # type: ignore[arg-type]
        run = int(np.searchsorted(self._runs, start // self._chunk, side="right")) - 1
        place, size = start, self.dtype.itemsize
        while place < stop:
            first = int(self._runs[run]) * self._chunk
            last = int(self._runs[run + 1]) * self._chunk if run + 1 < len(self._runs) else stop
            upto = min(stop, last)
            where = int(self._run_starts[run]) + (place - first) * size
            self._fill(content[(place - start) * size : (upto - start) * size], where)
            place, run = upto, run + 1
        return values

    def _fill(self, content: memoryview, where: int) -> None:
        while len(content):  # the system may give less than was asked for
            n_read = os.preadv(self._file, [content], where)
            if n_read == 0:
                raise OSError(f"The file ends at byte {where}, inside a matrix; it was cut short.")
            content, where = content[n_read:], where + n_read
