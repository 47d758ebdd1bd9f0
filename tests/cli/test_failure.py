"""Exit codes, messages without tracebacks, and no half files."""

import os
import signal
import subprocess
import sys

import anndata
import pytest

from scfm.cli import _files


def test_usage_errors_exit_with_2(command, folder):
    assert command("embed", folder / "cells.h5ad")[0] == 2
    assert command("no-such-command")[0] == 2
    assert command("fit", folder / "cells.h5ad", "model", "--n-steps", "many")[0] == 2


def test_missing_input_is_told_in_one_line(command, folder, tmp_path):
    code, out, err = command("annotate", tmp_path / "no.h5ad", tmp_path / "out.h5ad", "--model", folder / "model")
    assert code == 1
    assert out == ""
    assert "no.h5ad" in err
    assert "Traceback" not in err


def test_log_normalised_counts_name_the_cure_and_leave_no_file(command, folder, cells, tmp_path):
    normalised = cells.copy()
    normalised.layers["counts"] = cells.X
    normalised.X = normalised.X.log1p()
    normalised.write_h5ad(tmp_path / "log.h5ad")
    code, _, err = command("embed", tmp_path / "log.h5ad", tmp_path / "out.h5ad", "--model", folder / "model")
    assert code == 1
    assert 'layer="counts"' in err
    assert [path.name for path in tmp_path.iterdir()] == ["log.h5ad"]


def test_traceback_on_request(command, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SCFM_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        command("annotate", tmp_path / "no.h5ad", tmp_path / "out.h5ad", "--model", folder / "model")


def test_output_of_another_kind_is_refused_before_work(command, folder, tmp_path):
    code, _, err = command("annotate", folder / "cells.h5ad", tmp_path / "out.txt", "--model", folder / "model")
    assert code == 1
    assert ".h5ad" in err


def test_a_stopped_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("before")

    def stopped():
        with _files.whole(target) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_sigterm_leaves_no_half_file(tmp_path):
    """A child says when it has begun to write, and is then told to stop."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom scfm.cli import _app, _files\nimport signal\n"
        "signal.signal(signal.SIGTERM, _app._stop)\n"
        "with _files.whole(Path(sys.argv[1])) as beside:\n"
        "    beside.write_text('half')\n    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out.csv")], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"writing\n"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_zarr_in_and_out(command, folder, cells, tmp_path):
    cells.write_zarr(tmp_path / "cells.zarr")
    code, _, err = command("annotate", tmp_path / "cells.zarr", tmp_path / "out.zarr", "--model", folder / "model")
    assert code == 0, err
    assert "scfm_label" in anndata.read_zarr(tmp_path / "out.zarr").obs
