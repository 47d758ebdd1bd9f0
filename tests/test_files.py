"""Outputs are complete or as they were, whatever happens while they are written."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm import _files
from scfm._files import atomic_write, output_lock, write_adata
from scfm.errors import OutputError

WRITE_FOREVER = """
import sys, time
from pathlib import Path
from scfm._files import atomic_write
with atomic_write(Path(sys.argv[1])) as temporary_path:
    temporary_path.mkdir() if len(sys.argv) > 2 else None
    (temporary_path / "part" if len(sys.argv) > 2 else temporary_path).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
HOLD_LOCK = """
import sys, time
from scfm._files import output_lock
with output_lock(sys.argv[1]):
    print("holding", flush=True)
    time.sleep(60)
"""


def start(script, *arguments):
    child = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE)
    assert child.stdout.readline()
    return child


def write_folder(path, text):
    with atomic_write(path) as temporary_path:
        temporary_path.mkdir()
        (temporary_path / "file").write_text(text)


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path, folder):
    path = tmp_path / "output.zarr"
    child = start(WRITE_FOREVER, path, *(["folder"] if folder else []))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(list(tmp_path.iterdir())) == 1  # the case under test: something was left
    write_folder(path, "whole")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_running_process_writes_stays(tmp_path):
    child = start(WRITE_FOREVER, tmp_path / "output")
    try:
        with atomic_write(tmp_path / "output") as temporary_path:
            temporary_path.write_text("ours")
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_replaces_a_folder(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(_files, "_exchange", lambda first, second: False)
    for text in ("old", "new"):
        write_folder(tmp_path / "output", text)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert (tmp_path / "output" / "file").read_text() == "new"


def test_a_folder_replaces_a_folder_in_one_step(tmp_path, monkeypatch):
    write_folder(tmp_path / "output", "old")
    monkeypatch.setattr(Path, "rename", None)  # two steps would need it
    write_folder(tmp_path / "output", "new")
    assert (tmp_path / "output" / "file").read_text() == "new"


def test_a_process_killed_between_two_steps_loses_nothing(tmp_path):
    """Where the system cannot exchange two folders: the next write finds the old one under its temporary name."""
    script = (
        "import sys, os\nfrom pathlib import Path\nfrom scfm import _files\n_files._exchange = lambda first, second: False\n"
        "path = Path(sys.argv[1])\nrename = Path.rename\n"
        "def kill_after(self, target):\n    rename(self, target)\n    os.kill(os.getpid(), 9)\nPath.rename = kill_after\n"
        "with _files.atomic_write(path) as temporary_path:\n    temporary_path.mkdir()\n"
    )
    path = tmp_path / "output"
    write_folder(path, "old")
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path):
        raise KeyError
    assert (path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path):
    write_folder(tmp_path / "elsewhere", "theirs")
    (tmp_path / "output").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "output", "ours")
    assert not (tmp_path / "output").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "theirs"


def test_names_at_the_limit_of_the_file_system(tmp_path):
    path = tmp_path / ("µ" * 125 + ".csv")
    with atomic_write(path) as temporary_path:
        temporary_path.write_text("x")
    assert path.read_text() == "x"


WRITERS = {
    "text": "path.write_text('x' * 10**6)",
    "numpy": "np.save(path.open('wb'), np.zeros(10**6))",
    "torch": "torch.save(torch.zeros(10**6), path)",
    "pandas": "pd.DataFrame({'a': range(10**5)}).to_csv(path)",
    "safetensors": "safetensors.torch.save_file({'a': torch.zeros(10**6)}, path)",
    "h5ad": "anndata.AnnData(np.ones((1000, 1000), np.float32)).write_h5ad(path)",
    "zarr": "zarr.open_group(path, mode='w').create_array('a', data=np.random.rand(10**6))",
}
ON_A_FULL_DISK = """
import sys, anndata, numpy as np, pandas as pd, safetensors.torch, torch, zarr
from pathlib import Path
from scfm._files import atomic_write
target = Path(sys.argv[1]) / "output.h5ad"
target.write_text("before")
for writer in sys.argv[2:]:
    try:
        with atomic_write(target) as path:
            exec(writer)
    except Exception as error:
        print(type(error).__name__, error, target.read_text(), [path.name for path in target.parent.iterdir()])
"""


def run_on_small_disk(folder, script, *arguments):
    """Run a script that sees a disk of 200 kB in `folder`."""
    mounted = 'mount -t tmpfs -o size=200k none "$1" && shift && "$@"'
    command = [*("unshare", "-rm", "sh", "-c", mounted, "sh", folder), sys.executable, "-c", script, folder, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this user may not mount a small disk")
    return done.stdout


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a disk that can be filled")
def test_a_full_disk_is_recognized_in_the_error_of_every_library(tmp_path):
    lines = run_on_small_disk(tmp_path, ON_A_FULL_DISK, *WRITERS.values()).splitlines()
    assert len(lines) == len(WRITERS)
    for line in lines:
        assert re.fullmatch(
            r"OutputError The disk is full: \S+/output.h5ad needs more than \d.\d MB, and 0.\d MB are free. Free some space, "
            r"or choose an output on another disk. \S+/output.h5ad is unchanged. before \['output.h5ad'\]",
            line,
        ), line


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_limit_of_the_size_of_files_is_recognized_in_the_error_of_every_library(tmp_path):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({20_000}, {20_000}))\n"
    # After an error, threads of zarr write other chunks, and may leave a temporary folder, which the next writing removes.
    writers = [writer for name, writer in WRITERS.items() if name != "zarr"]
    command = [sys.executable, "-c", limit + ON_A_FULL_DISK, str(tmp_path), *writers]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    assert len(lines) == len(writers)
    for line in lines:
        assert re.fullmatch(
            r"OutputError \S+/output.h5ad could not be written completely, although .* are free: a quota or a limit of the size "
            r"of files \(`ulimit -f`\) is reached. Raise it, or choose an output on another disk. \S+/output.h5ad is unchanged. "
            r"before \['output.h5ad'\]",
            line,
        ), line


AS_NOBODY = """
import os, sys
from pathlib import Path
from scfm._files import require_folder, require_writable
os.setuid(65534)
locked = Path(sys.argv[1]) / "locked"
for call in (lambda: require_folder(locked / "a"), lambda: require_writable(locked / "a" / "x.csv", [".csv"])):
    try:
        call()
    except PermissionError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becomes another user")
def test_folders_without_permission_are_named():
    """Below a folder that cannot be listed, `Path.exists` raises an error without advice."""
    with tempfile.TemporaryDirectory() as name:  # other users cannot reach the folders of pytest
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "locked").mkdir(mode=0o700)
        command = [sys.executable, "-c", AS_NOBODY, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = f"The folder {folder / 'locked'} is not writable. Choose another output."
    assert done.stdout.splitlines() == [message] * 2, done.stderr


def test_an_output_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path):
    with (
        pytest.raises(OutputError, match=r"needs 1,000,000,000.0 GB, and .* GB are free"),
        atomic_write(tmp_path / "output", n_bytes=10**18),
    ):
        pytest.fail("the space was not compared first")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(OSError, match="not found") as caught, atomic_write(tmp_path / "output"):
        raise OSError(2, "not found")
    assert not isinstance(caught.value, OutputError)


def test_a_second_process_is_refused_until_the_first_has_finished(tmp_path):
    path = tmp_path / "output"
    child = start(HOLD_LOCK, path)
    try:
        with pytest.raises(OutputError, match=f"is being written by process {child.pid}"), output_lock(path):
            pytest.fail("two processes hold one lock")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with output_lock(path):  # a killed holder holds nothing
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_not_inherited_by_the_next_file_of_that_name(tmp_path):
    """The holder removes the lock file; who waited for the removed one must not think it has the lock."""
    with output_lock(tmp_path / "output"):
        lock_path = next(tmp_path.iterdir())
        descriptor = os.open(lock_path, os.O_RDWR)
    os.close(descriptor)
    with output_lock(tmp_path / "output"):
        assert lock_path.exists()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_nullable_strings_that_were_read_can_be_written(tmp_path, suffix):
    adata = anndata.AnnData(
        np.ones((2, 3), dtype=np.float32), obs=pd.DataFrame(index=pd.Index(["a", "b"], dtype="string"))
    )
    path = tmp_path / f"cells{suffix}"
    write_adata(adata, path)
    written = anndata.read_zarr(path) if suffix == ".zarr" else anndata.read_h5ad(path)
    assert list(written.obs_names) == ["a", "b"]
