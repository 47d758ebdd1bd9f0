"""A short, seeded part of the fuzz suite; `make fuzz` runs the whole of it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kills
import models
import run


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_data_in_many_forms(first, tmp_path):
    wrong = {}
    for seed in range(first, first + 15):
        case, complaint = run.run_case(seed, tmp_path, fits=8)
        if complaint is not None:
            wrong[seed] = (case.steps, complaint)
    assert not wrong


def test_damaged_models(tmp_path):
    paths = models.fit_models(tmp_path)
    expected = {name: models.outputs(models.scfm.load(path)) for name, path in paths.items()}
    found = {seed: models.run_case(seed, paths, expected, tmp_path) for seed in range(40)}
    assert not {seed: case for seed, case in found.items() if case[1] is not None}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("name", ["save", "fit", "embed", "pretrain"])
def test_kills_at_random_moments(name, tmp_path):
    program = kills.programs(tmp_path)[name]
    assert kills.kill_often(program, 3, seed=1) == []
