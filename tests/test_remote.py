"""Lists of files, and files behind URLs."""

import functools
import http.server
import threading

import anndata
import fsspec
import numpy as np
import pytest
import zarr

import scfm
from scfm._remote import RemotePath, input_paths
from scfm.data import CountSource

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:anndata"),
    pytest.mark.filterwarnings("ignore::UserWarning:zarr"),
]


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:60].copy()


@pytest.fixture
def folder(adata, tmp_path):
    for number in range(3):
        adata[20 * number : 20 * number + 20].copy().write_h5ad(tmp_path / f"part{number}.h5ad")
    return tmp_path


def test_patterns_and_lists_name_files_in_order(folder):
    expected = tuple(folder / f"part{number}.h5ad" for number in range(3))
    assert input_paths(folder / "part*.h5ad") == expected
    assert input_paths(str(folder / "part?.h5ad")) == expected
    (folder / "list.txt").write_text("# donors\npart2.h5ad\n\npart[01].h5ad\nmemory://other.h5ad\n")
    assert input_paths([folder / "list.txt"]) == (expected[2], *expected[:2], RemotePath("memory://other.h5ad"))
    assert input_paths(folder / "part1.h5ad") == expected[1:2]


def test_a_name_with_brackets_that_exists_is_a_file(folder):
    path = folder / "part[0].h5ad"
    path.write_bytes((folder / "part0.h5ad").read_bytes())
    assert input_paths(path) == (path,)


def test_lists_and_patterns_without_files_are_errors(folder):
    with pytest.raises(FileNotFoundError, match="No file matches"):
        input_paths(folder / "none*.h5ad")
    (folder / "empty.txt").write_text("\n")
    with pytest.raises(OSError, match="names no files"):
        input_paths(folder / "empty.txt")


def test_kinds_of_urls_that_cannot_be_read_say_what_is_missing(monkeypatch):
    with pytest.raises(OSError, match="fsspec does not know"):
        CountSource.of("nonsense://a.h5ad")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(OSError, match="Install s3fs to access S3"):
        CountSource.of("s3://bucket/a.h5ad")


@pytest.fixture
def server(folder):
    """A server of the folder. It answers whole files only, as the simplest servers do."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def urls(kind, adata, folder, request):
    if kind == "http":
        return [f"{request.getfixturevalue('server')}/part{number}.h5ad" for number in range(3)]
    if kind == "memory":
        for number in range(3):
            with fsspec.open(f"memory://part{number}.h5ad", "wb") as file:
                file.write((folder / f"part{number}.h5ad").read_bytes())
        return [f"memory://part{number}.h5ad" for number in range(3)]
    for number in range(3):
        adata[20 * number : 20 * number + 20].copy().write_zarr(folder / f"part{number}.zarr")
        fsspec.filesystem("memory").put(str(folder / f"part{number}.zarr"), f"/part{number}.zarr", recursive=True)
    return [f"memory://part{number}.zarr" for number in range(3)]


@pytest.mark.parametrize("kind", ["memory", "zarr in memory", "http"])
def test_files_behind_urls_are_pretrained_on_and_embedded_as_files_are(adata, folder, tmp_path, kind, request):
    found = urls(kind, adata, folder, request)
    config = scfm.FitConfig(n_steps=2, tokens_per_step=1024)
    models = [
        scfm.pretrain(paths, tmp_path / str(number), config=config, progress=False)
        for number, paths in enumerate((folder / "part*.h5ad", found))
    ]
    assert models[0].id == models[1].id
    scfm.tl.embed_files(found, tmp_path / "out.npy", models[0], progress=False)
    np.testing.assert_array_equal(
        np.load(tmp_path / "out.npy"), scfm.tl.embed(adata, models[0], copy=True).obsm["X_scfm"]
    )
    scfm.tl.embed_files(found[0], tmp_path / "out.h5ad", models[0], progress=False)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scfm"].shape == (20, 128)


def test_a_missing_url_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="memory://nowhere"):
        CountSource.of("memory://nowhere.h5ad")


@pytest.mark.parametrize("zarr_format", [2, 3, "sharded"])
def test_zarr_of_both_formats_and_in_shards_is_read(adata, tmp_path, zarr_format):
    with anndata.settings.override(zarr_write_format=2 if zarr_format == 2 else 3):
        adata.write_zarr(tmp_path / "a.zarr")
    if zarr_format == "sharded":
        group = zarr.open_group(tmp_path / "a.zarr", mode="r+", use_consolidated=False)
        for name in ("data", "indices"):
            values = group[f"X/{name}"][:]
            del group[f"X/{name}"]
            group["X"].create_array(name, data=values, chunks=(1000,), shards=(8000,))
        zarr.consolidate_metadata(group.store)
    block = CountSource.of(tmp_path / "a.zarr").rows(3, 17)
    assert (block != adata.X[3:17]).nnz == 0
