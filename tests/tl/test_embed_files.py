"""`embed_files` gives the numbers of `embed`, in every form, also when it is stopped and started again."""

import os
import shutil
import subprocess
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

import scfm
from scfm.errors import OutputError
from scfm.tl import _file_pass


@pytest.fixture(scope="module")
def model():
    return scfm.fit(scfm.datasets.pbmc()[:60].copy(), config=scfm.FitConfig(n_steps=1), progress=False)


@pytest.fixture
def files(tmp_path):
    """Two files of 40 and 33 cells; small blocks cut each in several."""
    adata = scfm.datasets.pbmc()
    adata[:40].copy().write_h5ad(tmp_path / "one.h5ad")
    adata[40:73].copy().write_h5ad(tmp_path / "two.h5ad")
    return [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]


@pytest.fixture
def expected(model):
    return scfm.tl.embed(scfm.datasets.pbmc()[:73].copy(), model, copy=True).obsm["X_scfm"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(_file_pass, "BLOCK_CELLS", 16)


def embedding_in(path):
    match path.suffix:
        case ".npy":
            return np.load(path)
        case ".csv":
            return pd.read_csv(path, index_col=0).filter(like="scfm_").to_numpy(np.float32)
        case ".parquet":
            return pd.read_parquet(path).filter(like="scfm_").to_numpy()
        case ".zarr":
            return anndata.read_zarr(path).obsm["X_scfm"]
        case _:
            return anndata.read_h5ad(path).obsm["X_scfm"]


@pytest.mark.filterwarnings("ignore::UserWarning:anndata")
@pytest.mark.filterwarnings("ignore::UserWarning:zarr")
@pytest.mark.filterwarnings("error:Writing zarr v2:UserWarning")  # what a user can do nothing about
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".npy", ".csv"])
@pytest.mark.parametrize("n_files", [1, 2])
def test_every_form_holds_the_numbers_of_embed(model, files, expected, tmp_path, suffix, n_files):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out{suffix}"
    n_cells = scfm.tl.embed_files(files[:n_files], out, model, progress=False)
    assert n_cells == (40, 73)[n_files - 1]
    np.testing.assert_allclose(embedding_in(out), expected[:n_cells], rtol=0 if suffix != ".csv" else 1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["one.h5ad", "two.h5ad", out.name])


def test_a_copy_keeps_what_the_input_holds_and_the_input_stays(model, files, tmp_path):
    before = files[0].read_bytes()
    scfm.tl.embed_files(files[:1], tmp_path / "out.h5ad", model, progress=False)
    source, written = anndata.read_h5ad(files[0]), anndata.read_h5ad(tmp_path / "out.h5ad")
    assert files[0].read_bytes() == before
    assert (source.X != written.X).nnz == 0
    pd.testing.assert_frame_equal(source.obs, written.obs)
    assert written.uns["scfm"]["X_scfm"]["model_id"] == model.id
    assert set(written.obsm) == {*source.obsm, "X_scfm"}


def test_several_files_are_told_apart(model, files, tmp_path):
    scfm.tl.embed_files(files, tmp_path / "out.h5ad", model, progress=False)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs["file"].value_counts().to_dict() == {
        "one.h5ad": 40,
        "two.h5ad": 33,
    }


class Stopped(BaseException):
    pass


def stop_after(model, n_blocks, monkeypatch):
    """Let the model embed `n_blocks` blocks and stop at the next; returns the list of blocks embedded."""
    embed, blocks = model.embed, []

    def counted(cells, **settings):
        if len(blocks) == n_blocks:
            raise Stopped
        blocks.append(cells.n_cells)
        return embed(cells, **settings)

    monkeypatch.setattr(model, "embed", counted)
    return blocks


@pytest.mark.parametrize("n_blocks", [1, 3, 5])
def test_a_stopped_run_goes_on_where_it_was(model, files, expected, tmp_path, monkeypatch, n_blocks):
    with monkeypatch.context() as patch:
        first = stop_after(model, n_blocks, patch)
        with pytest.raises(Stopped) as stopped:
            scfm.tl.embed_files(files, tmp_path / "out.npy", model, progress=False)
    assert stopped.value.__notes__ == [
        f"{sum(first)} of 73 cells are in {tmp_path / 'out.npy.part'}; the same call continues from there."
    ]
    assert not (tmp_path / "out.npy").exists()
    with monkeypatch.context() as patch:
        second = stop_after(model, 99, patch)
        scfm.tl.embed_files(files, tmp_path / "out.npy", model, progress=False)
    assert sum(first) + sum(second) == 73
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_another_job_does_not_go_on_with_the_progress_of_this_one(model, files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(model, 2, patch)
        with pytest.raises(Stopped):
            scfm.tl.embed_files(files, tmp_path / "out.npy", model, progress=False)
    blocks = stop_after(model, 99, monkeypatch)
    scfm.tl.embed_files(files, tmp_path / "out.npy", model, hidden_layer=0, progress=False)
    assert sum(blocks) == 73


def test_impossible_outputs_are_refused_before_any_work(model, files, tmp_path):
    with pytest.raises(ValueError, match=r"\.parquet"):
        scfm.tl.embed_files(files, tmp_path / "out.txt", model)
    with pytest.raises(ValueError, match="input"):
        scfm.tl.embed_files(files, files[0], model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5ad", "two.h5ad"]


def embed_some(model, files, out, monkeypatch, n_blocks):
    """Stop a run after `n_blocks` blocks."""
    with monkeypatch.context() as patch:
        stop_after(model, n_blocks, patch)
        with pytest.raises(Stopped):
            scfm.tl.embed_files(files, out, model, progress=False)


@pytest.mark.parametrize(("row", "n_again"), [(3, 73), (38, 41)])
def test_counts_that_changed_are_noticed_by_their_content(model, files, tmp_path, monkeypatch, caplog, row, n_again):
    """Name, size and time of the file are as before. What was not embedded yet may change."""
    embed_some(model, files, tmp_path / "out.npy", monkeypatch, 2)  # 32 cells
    status = files[0].stat()
    shutil.copy(files[0], tmp_path / "copy.h5ad")
    with h5py.File(tmp_path / "copy.h5ad", "r+") as file:
        file["X/data"][file["X/indptr"][row]] += 1
    (tmp_path / "copy.h5ad").replace(files[0])
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (files[0].stat().st_size, files[0].stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with monkeypatch.context() as patch:
        blocks = stop_after(model, 99, patch)
        scfm.tl.embed_files(files, tmp_path / "out.npy", model, progress=False)
    assert sum(blocks) == n_again
    assert ("counts have changed" in caplog.text) == (n_again == 73)
    changed = anndata.concat([anndata.read_h5ad(path) for path in files])
    np.testing.assert_array_equal(
        np.load(tmp_path / "out.npy"), scfm.tl.embed(changed, model, copy=True).obsm["X_scfm"]
    )


def test_a_touched_file_does_not_start_again(model, files, tmp_path, monkeypatch):
    embed_some(model, files, tmp_path / "out.npy", monkeypatch, 2)
    files[0].touch()
    blocks = stop_after(model, 99, monkeypatch)
    scfm.tl.embed_files(files, tmp_path / "out.npy", model, progress=False)
    assert sum(blocks) == 73 - 32


def test_a_second_process_is_refused(model, files, tmp_path):
    script = "import sys\nfrom scfm._files import output_lock\nwith output_lock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "out.npy")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=rf"out.npy is being written by process {other.pid}"):
            scfm.tl.embed_files(files, tmp_path / "out.npy", model, progress=False)
        other.stdin.close()
    assert scfm.tl.embed_files(files, tmp_path / "out.npy", model, progress=False) == 73


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a disk that can be filled")
@pytest.mark.parametrize("room", [20, 60])  # kB: for less than the progress; for the progress, not for the output
def test_a_full_disk_is_said_and_leaves_what_was_there(model, files, tmp_path, room):
    """A memory map of a file without room would kill the process."""
    model.save(tmp_path / "model")
    (tmp_path / "small").mkdir()
    script = (
        "import sys, scfm\nfrom pathlib import Path\nout = Path(sys.argv[1]) / 'out.npy'\nout.write_text('before')\n"
        "try:\n    scfm.tl.embed_files(sys.argv[3:], out, scfm.load(sys.argv[2]), progress=False)\n"
        "except scfm.errors.OutputError as error:\n    print(error)\nprint(out.read_text())\n"
    )
    mounted = f'mount -t tmpfs -o size={room}k none "$1" && shift && "$@"'
    command = ["unshare", "-rm", "sh", "-c", mounted, "sh", tmp_path / "small", sys.executable, "-c", script,
               tmp_path / "small", tmp_path / "model", *files]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this user may not mount a small disk")
    message, before = done.stdout.splitlines()
    assert message.startswith("The disk is full: "), done.stderr
    assert "Free some space" in message
    assert before == "before"
