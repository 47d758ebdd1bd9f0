"""An encoding, an objective, a family, a sampling and a command, each added by one file of this folder and used like built-in ones."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import scfm
from scfm.cli._app import run
from scfm.cli._registry import COMMANDS
from scfm.encoding.registry import ENCODINGS
from scfm.families import FAMILIES
from scfm.objectives import OBJECTIVES
from scfm.train import CellStream
from scfm.train.sampling import SAMPLINGS

SHORT = scfm.FitConfig(n_steps=2, tokens_per_step=1024)


@pytest.fixture(scope="module", autouse=True)
def toys():
    names = ("toy_encoding", "toy_objective", "toy_family", "toy_sampling", "toy_command")
    for name in names:
        specification = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        specification.loader.exec_module(module)
    yield
    ENCODINGS.remove("toy_bits")
    OBJECTIVES.remove("toy_half_hidden")
    FAMILIES.remove("toy")
    SAMPLINGS.remove("toy-every-other")
    COMMANDS.pop("toy-count", None)
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def cells():
    return scfm.datasets.pbmc()[:60].copy()


@pytest.fixture(scope="module")
def fitted(cells):
    return scfm.fit(cells.copy(), preset="toy-tiny", config=SHORT, progress=False)


def test_fit_trains_the_toy_family_on_its_encoding_and_objective(cells, fitted):
    assert fitted.encoding.config.kind == "toy_bits"
    assert fitted.objective == "toy_half_hidden"
    assert np.isfinite(fitted.history["stages"][0]["losses"]).all()
    encoded = scfm.pp.encode(cells, fitted)
    counts = cells.X[0].toarray().ravel()
    is_gene = encoded.select([0]).gene_ids_T.numpy() != fitted.encoding.vocabulary.cls_id
    expected = np.ceil(np.log2(1 + counts[counts > 0]))
    np.testing.assert_array_equal(encoded.select([0]).values_T.numpy()[is_gene], expected[: is_gene.sum()])


def test_a_toy_checkpoint_is_recognized_loaded_and_fine_tuned(cells, fitted, tmp_path):
    fitted.save(tmp_path / "ours")
    scfm.families.convert(tmp_path / "ours", tmp_path / "theirs", to="toy")
    assert scfm.families.recognize(tmp_path / "theirs").name == "toy"
    loaded = scfm.load(tmp_path / "theirs")
    encoded = scfm.pp.encode(cells, fitted)
    np.testing.assert_array_equal(loaded.embed(encoded), fitted.embed(encoded))
    tuned = scfm.fit(
        cells.copy(), labels_key="bulk_labels", model=tmp_path / "theirs", pretrain=True, config=SHORT,
        pretrain_config=SHORT, baselines=False, progress=False,
    )  # fmt: skip
    assert [stage["objective"] for stage in tuned.history["stages"]] == ["toy_half_hidden", "classification"]


def test_pretraining_over_files_knows_the_toy_preset(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = scfm.pretrain([tmp_path / "cells.h5ad"], tmp_path / "run", preset="toy-tiny", config=SHORT, progress=False)
    assert scfm.load(tmp_path / "run" / "model").id == model.id


def test_a_stream_draws_by_the_toy_sampling(cells, fitted, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    stream = CellStream(tmp_path / "cells.h5ad", fitted.encoding, batch_cells=10, sampling="toy-every-other")
    drawn = [cell for batch in stream for cell in batch.cell_index_B.tolist()]
    assert sorted(drawn) == sorted(2 * list(range(1, 60, 2)))


def test_the_command_line_has_the_toy_command_and_the_toy_preset(cells, tmp_path, capsys):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert run(["toy-count", str(tmp_path / "cells.h5ad")]) == 0
    assert capsys.readouterr().out == "60\n"
    options = ["--preset", "toy-tiny", "--n-steps", "2", "--no-progress"]
    assert run(["fit", str(tmp_path / "cells.h5ad"), str(tmp_path / "model"), *options]) == 0
    assert scfm.load(tmp_path / "model").encoding.config.kind == "toy_bits"
