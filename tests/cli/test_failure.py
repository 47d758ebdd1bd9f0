"""Exit codes, messages without tracebacks, and no half files."""

import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys

import anndata
import h5py
import pytest

import scfm
from scfm._files import atomic_write


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


def test_log_normalized_counts_name_the_cure_and_leave_no_file(command, folder, cells, tmp_path):
    normalized = cells.copy()
    normalized.layers["counts"] = cells.X
    normalized.X = normalized.X.log1p()
    normalized.write_h5ad(tmp_path / "log.h5ad")
    code, _, err = command("embed", tmp_path / "log.h5ad", tmp_path / "out.h5ad", "--model", folder / "model")
    assert code == 1
    assert "seem to hold raw counts: pass --layer counts" in err  # as an option, which it is here
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["log.h5ad"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Files and models with one fault each."""
    place = tmp_path_factory.mktemp("bad")
    (place / "text.h5ad").write_text("hello")
    (place / "nothing.h5ad").touch()
    with h5py.File(place / "other.h5ad", "w") as file:
        file["x"] = 1
    with h5py.File(place / "cellranger.h5", "w") as file:
        file.create_group("matrix").update({"barcodes": [1], "features": [1], "data": [1]})
    (place / "outs").mkdir()
    (place / "outs" / "matrix.mtx.gz").touch()
    (place / "folder.h5ad").mkdir()
    (place / "folder.zarr").mkdir()
    (place / "file").write_text("mine")
    return place


def with_value(adata, value):
    adata.X = adata.X.toarray().astype("float32")
    adata.X[3, 7] = value


def without_counts_in_a_cell(adata):
    adata.X = adata.X.toarray()
    adata.X[3] = 0


SPOILED = {
    "infinite": (lambda adata: with_value(adata, float("inf")), "holds infinite values"),
    "nan": (lambda adata: with_value(adata, float("nan")), "holds NaN"),
    "negative": (lambda adata: with_value(adata, -1), "holds negative values"),
    "no-matrix": (lambda adata: anndata.AnnData(obs=adata.obs, var=adata.var), "has no X, where counts were expected"),
    "no-genes": (lambda adata: adata[:, :0].copy(), "have no genes"),
    "empty-cell": (without_counts_in_a_cell, "1 of 60 cells express no gene"),
    "duplicated": (lambda adata: setattr(adata, "var_names", ["CST3", *adata.var_names[:-1]]), "several columns each"),
    "numbered": (lambda adata: setattr(adata, "var_names", [f"gene{n}" for n in range(765)]), "None of the 765 genes"),
    "mouse": (lambda adata: setattr(adata, "var_names", adata.var_names.str.capitalize()), "look like mouse"),
}


@pytest.mark.filterwarnings("ignore:.*names are not unique")
@pytest.mark.parametrize("command_name", ["annotate", "embed", "perturb"])
@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_used_is_told_in_one_line_and_leaves_no_file(
    command, folder, cells, tmp_path, command_name, name
):
    spoil, words = SPOILED[name]
    adata = cells.copy()
    adata = spoil(adata) or adata
    adata.write_h5ad(tmp_path / "bad.h5ad")
    out = tmp_path / ("out.csv" if command_name == "perturb" else "out.h5ad")
    code, _, err = command(command_name, tmp_path / "bad.h5ad", out, "--model", folder / "model")
    assert code == 1
    assert words in err.splitlines()[-1]
    assert "Warning" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.h5ad"]


@pytest.mark.parametrize("command_name", ["annotate", "perturb", "screen", "fit", "check"])
def test_no_cells_are_told(command, folder, cells, tmp_path, command_name):
    cells[:0].copy().write_h5ad(tmp_path / "none.h5ad")
    out = {"annotate": ["out.h5ad"], "check": []}.get(command_name, ["out.csv"])
    model = [] if command_name == "fit" else ["--model", folder / "model"]
    code, told, err = command(command_name, tmp_path / "none.h5ad", *(tmp_path / name for name in out), *model)
    assert code == 1
    assert "0 cells x 765 genes" in told if command_name == "check" else "hold no cells (0 x 765)" in err


def test_a_misfit_among_many_files_is_told_before_any_work(command, folder, cells, tmp_path):
    mouse = cells.copy()
    mouse.var_names = mouse.var_names.str.capitalize()
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    inputs = (folder / "cells.h5ad", tmp_path / "mouse.h5ad")
    code, _, err = command("embed", *inputs, tmp_path / "out.npy", "--model", folder / "model")
    assert code == 1
    assert "look like mouse" in err
    assert "embedding" not in err  # no bar
    assert [path.name for path in tmp_path.iterdir()] == ["mouse.h5ad"]


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_gene(path):
    path.write_text(path.read_text().replace('"CST3"', '"CST4"'))


@pytest.mark.parametrize("command_name", ["annotate", "embed"])  # in memory, and streamed
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.h5ad", "cannot be read as an .h5ad file"),
        ("nothing.h5ad", "is empty (0 bytes)"),
        ("other.h5ad", "does not hold an AnnData: it has no obs and no var"),
        ("folder.h5ad", "is a folder"),
        ("cellranger.h5", "Convert it: `import scanpy as sc; adata = sc.read_10x_h5("),
        ("outs", "Convert it: `import scanpy as sc; adata = sc.read_10x_mtx("),
        ("folder.zarr", "folder.zarr"),
        ("none.zarr", "There is no"),
    ],
)
def test_what_is_no_anndata_is_named_in_one_sentence(command, folder, bad, tmp_path, command_name, name, words):
    code, _, err = command(command_name, bad / name, tmp_path / "out.h5ad", "--model", folder / "model")
    assert code == 1
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_short_is_told_apart(command, folder, tmp_path):
    shutil.copy(folder / "cells.h5ad", tmp_path / "cells.h5ad")
    cut_in_half(tmp_path / "cells.h5ad")
    code, _, err = command("check", tmp_path / "cells.h5ad", "--model", folder / "model")
    assert code == 1
    assert "cut short" in err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda model: cut_in_half(model / "weights.safetensors"), "cut short"),
        (lambda model: (model / "weights.safetensors").unlink(), "weights.safetensors"),
        (lambda model: (model / "vocabulary.json").unlink(), "vocabulary.json"),
        (
            lambda model: rename_gene(model / "vocabulary.json"),
            "vocabulary.json is not the file that this model was saved with",
        ),
        (lambda model: cut_in_half(model / "config.json"), "not valid JSON"),
        (lambda model: (model / "config.json").write_text('{"format": "scfm"}'), "has format version None"),
    ],
)
def test_a_damaged_model_names_the_file(command, folder, tmp_path, damage, words):
    shutil.copytree(folder / "model", tmp_path / "model")
    damage(tmp_path / "model")
    code, _, err = command("check", folder / "cells.h5ad", "--model", tmp_path / "model")
    assert code == 1
    assert words in err
    assert err.count("\n") == 1


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_a_pickle_with_code_is_refused_and_not_run(command, tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    code, _, err = command("convert", tmp_path / "model.pt", tmp_path / "ours")
    assert code == 1
    assert "model.pt is not a readable pickle" in err
    assert "weights_only" not in err  # torch's own message advises to switch its guard off
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_cells_are_no_model(command, folder):
    code, _, err = command("check", folder / "cells.h5ad", "--model", folder / "cells.h5ad")
    assert code == 1
    assert "holds cells, not a model" in err


@pytest.mark.parametrize("name", ["folder.h5ad", "folder.zarr", "file/out.h5ad"])
@pytest.mark.parametrize("command_name", ["annotate", "embed"])
def test_outputs_that_would_destroy_or_fail_are_refused_before_work(command, folder, bad, command_name, name):
    code, out, err = command(command_name, folder / "cells.h5ad", bad / name, "--model", folder / "model")
    assert (code, out) == (1, "")
    assert "Choose another output" in err
    assert (bad / name).is_dir() == ("folder" in name)


@pytest.mark.parametrize("command_name", ["annotate", "embed"])
def test_the_input_is_never_the_output(command, folder, command_name):
    before = (folder / "cells.h5ad").read_bytes()
    code, _, err = command(command_name, folder / "cells.h5ad", folder / "cells.h5ad", "--model", folder / "model")
    assert code == 1
    assert "inputs are never changed" in err
    assert (folder / "cells.h5ad").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_before_work(command, folder, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = command("embed", folder / "cells.h5ad", tmp_path / "out.npy", "--model", folder / "model")
    tmp_path.chmod(0o700)
    assert code == 1
    assert "cannot be written to" in err


def test_fit_does_not_train_for_a_place_it_may_not_save_to(command, folder, bad, monkeypatch):
    untrained = functools.wraps(scfm.fit)(
        lambda *_, **__: pytest.fail("trained")
    )  # the options come from its signature
    monkeypatch.setattr("scfm.fit", untrained)
    for target in (bad / "folder.h5ad", bad / "file"):
        code, _, err = command("fit", folder / "cells.h5ad", target)
        assert code == 1
        assert "not overwritten" in err


@pytest.mark.parametrize("column", ["S_score", "n_counts"])  # fractions, and whole numbers
def test_a_measurement_is_no_label(command, folder, tmp_path, column):
    code, _, err = command("fit", folder / "cells.h5ad", tmp_path / "m", "--labels-key", column, "--no-progress")
    assert code == 1
    assert "looks like a measurement" in err


def test_too_few_cells_to_hold_one_out_are_told(command, folder, cells, tmp_path):
    one_each = cells.obs.groupby("bulk_labels", observed=True).head(1).index
    cells[one_each].copy().write_h5ad(tmp_path / "few.h5ad")
    code, _, err = command("fit", tmp_path / "few.h5ad", tmp_path / "m", "--labels-key", "bulk_labels", "--no-progress")
    assert code == 1
    assert "No cell can be held out" in err


def test_a_confidence_is_a_probability(command, folder, tmp_path):
    where = (folder / "cells.h5ad", tmp_path / "out.h5ad", "--model", folder / "model")
    code, _, err = command("annotate", *where, "--min-confidence", "2")
    assert code == 1
    assert "from 0 to 1" in err


def test_a_run_is_no_file(command, folder, bad):
    code, _, err = command("pretrain", folder / "cells.h5ad", bad / "file", "--n-steps", "1", "--no-progress")
    assert code == 1
    assert "Choose another output" in err
    assert (bad / "file").read_text() == "mine"


def test_an_error_that_nobody_foresaw_is_one_line_that_says_where_to_look(command, monkeypatch):
    def broken():
        raise RuntimeError("out of luck")

    monkeypatch.setattr("scfm.cli.doctor.examine", broken)
    code, _, err = command("doctor")
    assert code == 1
    assert err == "scfm: out of luck (RuntimeError; SCFM_TRACEBACK=1 shows where)\n"


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
        with atomic_write(target) as temporary_path:
            temporary_path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_sigterm_leaves_no_half_file(tmp_path):
    """A child says when it has begun to write, and is then told to stop."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom scfm._files import atomic_write\nfrom scfm.cli import _app\nimport signal\n"
        "signal.signal(signal.SIGTERM, _app._stop)\n"
        "with atomic_write(Path(sys.argv[1])) as temporary_path:\n"
        "    temporary_path.write_text('half')\n    print('writing', flush=True)\n    time.sleep(60)\n"
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
