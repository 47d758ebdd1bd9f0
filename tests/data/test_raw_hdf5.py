"""Reading past HDF5. Oracle: h5py's own reading."""

import h5py
import numpy as np
import pytest

from scfm.data.raw_hdf5 import RawDataset

SPANS = [(0, 0), (0, 1), (3, 29), (9, 11), (0, 1000), (995, 1000), (500, 990)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "numbers.h5"


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint16"])
@pytest.mark.parametrize("chunks", [None, (10,), (333,), (4000,)])
def test_ranges_are_those_that_h5py_reads(path, dtype, chunks):
    values = np.random.default_rng(0).integers(0, 1000, 1000).astype(dtype)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", values.shape, dtype=dtype, chunks=chunks, maxshape=chunks and (None,))
        dataset[500:] = values[500:]
        file.create_dataset("between", data=np.zeros(100))  # the chunks do not lie end to end
        dataset[:500] = values[:500]
    with h5py.File(path) as file:
        raw = RawDataset.of(file["x"])
        assert raw.shape == (1000,)
        for start, stop in SPANS:
            np.testing.assert_array_equal(raw[start:stop], file["x"][start:stop])
            assert raw[start:stop].dtype == file["x"].dtype


@pytest.mark.parametrize(
    "settings",
    [
        {"data": np.ones(100), "compression": "gzip"},
        {"data": np.ones(100), "fletcher32": True},
        {"data": np.ones(100, dtype=">f4")},
        {"data": np.ones(100, dtype=bool)},
        {"data": np.ones((10, 10))},
        {"shape": (100,), "chunks": (10,)},  # nothing was written
        {"shape": (0,), "chunks": (10,), "maxshape": (None,)},
    ],
)
def test_what_is_not_plain_numbers_is_left_to_h5py(path, settings):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", **settings)
    with h5py.File(path) as file:
        assert RawDataset.of(file["x"]) is None


def test_a_file_that_was_cut_short_is_an_error(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(1000.0))
    with h5py.File(path) as file:
        raw = RawDataset.of(file["x"])
        start = file["x"].id.get_offset()
    with path.open("r+b") as file:
        file.truncate(start + 80)
    np.testing.assert_array_equal(raw[:10], np.arange(10.0))
    with pytest.raises(OSError, match="cut short"):
        raw[:11]
