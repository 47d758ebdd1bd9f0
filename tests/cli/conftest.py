"""A small file, a small model, and a way to run a command line in this process."""

import json

import pytest

import scfm
from scfm.cli._app import run


@pytest.fixture(scope="session")
def cells():
    return scfm.datasets.pbmc()[:60].copy()


@pytest.fixture(scope="session")
def folder(cells, tmp_path_factory):
    """A folder with `cells.h5ad` and the directory `model`, fitted on its labels."""
    path = tmp_path_factory.mktemp("cli")
    cells.write_h5ad(path / "cells.h5ad")
    config = scfm.FitConfig(n_steps=2)
    scfm.fit(cells.copy(), labels_key="bulk_labels", config=config, pretrain_config=config, progress=False).save(
        path / "model"
    )
    return path


@pytest.fixture
def command(capsys):
    """Run a command line; returns exit code, stdout and stderr."""

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def result(command):
    """Run a command line with `--json` that must succeed; returns the object."""

    def call(*arguments):
        code, out, err = command(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call
