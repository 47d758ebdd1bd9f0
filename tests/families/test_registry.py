"""A family from one file is found everywhere: it is listed, loaded, converted, pretrained, and named in errors."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import scfm
from scfm.encoding import ENCODINGS
from scfm.families import FAMILIES
from scfm.objectives import OBJECTIVES

GENES = [f"GENE{index}" for index in range(20)]


@pytest.fixture
def toy():
    spec = importlib.util.spec_from_file_location("toy_family", Path(__file__).with_name("toy_family.py"))
    module = sys.modules["toy_family"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    FAMILIES.remove("toy")
    OBJECTIVES.remove("toy_small_states")
    ENCODINGS.remove("toy_set")
    del sys.modules["toy_family"]


@pytest.fixture
def adata():
    cells = scfm.datasets.pbmc()[:40, :20].copy()
    cells.var_names = GENES
    return cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()


def test_it_is_loaded_converted_and_written_back(toy, adata, tmp_path):
    model = toy.build(GENES)
    toy.write(model, tmp_path / "theirs")
    assert scfm.families.recognize(tmp_path / "theirs") is toy.FAMILY
    loaded = scfm.load(tmp_path / "theirs")
    cells = scfm.pp.encode(adata, loaded)
    assert np.array_equal(loaded.embed(cells), model.embed(cells))
    scfm.families.convert(tmp_path / "theirs", tmp_path / "ours")
    assert scfm.load(tmp_path / "ours").id == loaded.id
    scfm.families.convert(tmp_path / "ours", tmp_path / "back")  # the family that has the encoding
    assert (tmp_path / "back" / "toy.json").read_text() == (tmp_path / "theirs" / "toy.json").read_text()


def test_its_preset_is_pretrained_from_files_and_fine_tuned(toy, adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    config = scfm.FitConfig(n_steps=3, tokens_per_step=256, accelerator="cpu")
    model = scfm.pretrain(
        [tmp_path / "cells.h5ad"], tmp_path / "run", preset="toy-tiny", init=None, config=config, progress=False
    )
    assert model.objective == "toy_small_states"
    assert scfm.load(tmp_path / "run" / "model").id == model.id
    adata.obs["label"] = ["a", "b"] * (adata.n_obs // 2) + ["a"] * (adata.n_obs % 2)
    quick = {"config": config.replace(n_steps=1), "baselines": False, "progress": False}
    fitted = scfm.fit(adata, labels_key="label", model=model, pretrain=False, **quick)
    assert fitted.labels == ("a", "b")


def test_it_is_listed(toy):
    assert "toy-tiny" in scfm.families.table().index
    assert scfm.families.preset("toy-tiny") is toy.PRESET
    with pytest.raises(ValueError, match="toy_set"):
        scfm.EncodingConfig(kind="nothing")
    with pytest.raises(ValueError, match="already"):
        FAMILIES.add("toy", object())


def test_without_it_nothing_of_it_is_left():
    assert "toy" not in FAMILIES
    assert list(FAMILIES) == ["geneformer", "scgpt", "scbert", "scfoundation", "scfm"]
    assert list(ENCODINGS) == ["rank", "bin", "bucket", "continuous"]
