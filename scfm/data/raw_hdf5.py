"""Read ranges of an uncompressed HDF5 dataset directly from the file.

The HDF5 library holds a global lock while it reads, and copies each chunk twice. If a dataset is neither compressed nor
converted, the library is used only to find the offsets of its chunks, which are then read by `preadv`, from several
threads at once.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RawDataset:
    """A one-dimensional dataset, given by the offsets of its chunks in the file.

    Parameters
    ----------
    path
        The file.
    starts
        Offset in bytes of each chunk, in the order of the elements, shape (n_chunks,), int64.
    chunk
        Number of elements per chunk; the last chunk may hold fewer valid ones.
    size, dtype
        Number of elements of the dataset, and their type.
    """

    def __init__(self, path: str, starts: NDArray[np.int64], *, chunk: int, size: int, dtype: np.dtype[Any]) -> None:
        self._chunk = chunk
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.shape, self.dtype = (size,), dtype
        # Adjacent chunks form a run, which one call can read. Run i starts with chunk `_runs[i]`, at byte `_run_starts[i]`.
        apart = np.diff(starts) != chunk * dtype.itemsize
        self._runs = np.concatenate([[0], np.flatnonzero(apart) + 1])
        self._run_starts = starts[self._runs]

    @classmethod
    def of(cls, dataset: Any) -> RawDataset | None:
        """Find the chunks of an `h5py.Dataset`; None if they are compressed, converted, external or incomplete."""
        import h5py

        creation, dtype, path = dataset.id.get_create_plist(), dataset.dtype, dataset.file.filename
        plain = (
            dataset.file.driver != "fileobj"  # a remote file
            and dataset.ndim == 1
            and dataset.size
            and creation.get_nfilters() == 0
            and creation.get_external_count() == 0
        )
        if not (plain and dtype.kind in "biuf" and dtype.isnative and dataset.file.userblock_size == 0):
            return None
        if dtype.kind == "b" or not hasattr(os, "preadv"):  # booleans are stored as enumerations, which h5py converts
            return None
        layout = creation.get_layout()
        if layout == h5py.h5d.CONTIGUOUS and (start := dataset.id.get_offset()) is not None:
            return cls(path, np.array([start]), chunk=dataset.size, size=dataset.size, dtype=dtype)
        if layout != h5py.h5d.CHUNKED:
            return None
        starts = np.full(-(-dataset.size // dataset.chunks[0]), -1, dtype=np.int64)

        def add_chunk(info: Any) -> None:
            starts[info.chunk_offset[0] // dataset.chunks[0]] = info.byte_offset

        dataset.id.chunk_iter(add_chunk)
        if (starts < 0).any():  # a chunk that was never written is not in the file
            return None
        return cls(path, starts, chunk=dataset.chunks[0], size=dataset.size, dtype=dtype)

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """Read elements start..stop; simultaneous reads do not wait for each other."""
        start, stop, _ = span.indices(self.shape[0])
        values = np.empty(max(stop - start, 0), dtype=self.dtype)
        content = memoryview(values.view(np.uint8))  # type: ignore[arg-type]
        run = int(np.searchsorted(self._runs, start // self._chunk, side="right")) - 1
        element, size = start, self.dtype.itemsize
        while element < stop:
            first = int(self._runs[run]) * self._chunk
            last = int(self._runs[run + 1]) * self._chunk if run + 1 < len(self._runs) else stop
            upto = min(stop, last)
            offset = int(self._run_starts[run]) + (element - first) * size
            self._fill(content[(element - start) * size : (upto - start) * size], offset)
            element, run = upto, run + 1
        return values

    def _fill(self, content: memoryview, offset: int) -> None:
        while len(content):  # a read may return fewer bytes than requested
            n_read = os.preadv(self._file, [content], offset)
            if n_read == 0:
                raise OSError(f"The file ends at byte {offset}, inside a matrix; it was cut short. Copy it again.")
            content, offset = content[n_read:], offset + n_read
