"""What a training step asks of a GPU, counted on a pretended one (`tests/pretended`): launches, copies, mixed devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scfm
from scfm.data import CellBatch
from scfm.train.steps import MemorySource, Steps, pinned, sent

PRETENDED = Path(__file__).parents[1] / "pretended"
CASES = ["masked", "bin", "generative", "scgpt-human", "scbert", "inference"]
PRECISIONS = ["32-true", "bf16-mixed"]
SIZES = [(8, 64), (3, 40)]  # cells, tokens of the longest
MAX_COPIES = 7


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The compiled half of the pretended device."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler")
    from torch.utils.cpp_extension import include_paths

    path = tmp_path_factory.mktemp("pretended") / "device.so"
    libraries = Path(torch.__file__).parent / "lib"
    command = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", *(f"-isystem{each}" for each in include_paths())]
    command += [
        PRETENDED / "device.cpp",
        f"-L{libraries}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{libraries}",
        "-o",
        path,
    ]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def counts(library):
    """Counts by case, precision and number of cells."""
    jobs = [(case, precision, *size) for case in CASES for precision in PRECISIONS for size in SIZES]
    folders = [Path(scfm.__file__).parents[1], PRETENDED, PRETENDED.parent / "ops"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    command = [sys.executable, PRETENDED / "step.py", json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {job[:3]: json.loads(line) for job, line in zip(jobs, done.stdout.splitlines(), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_launches_and_copies_of_a_step(counts, case, precision):
    """The host waits for nothing but the counter of random features; no number of cells changes the number of launches."""
    many, few = (counts[case, precision, n_cells] for n_cells, _ in SIZES)
    for part, found in many.items():
        assert found["launches"] == few[part]["launches"], (part, found["kernels"], few[part]["kernels"])
        assert found["mixes"] == {}, part
    forward = many["forward"]
    assert forward["sent"] + sum(forward["blocking"].values()) <= MAX_COPIES
    expected_waits = {"scbert": 1, "inference": 4}.get(case, 0)  # a batch to embed is sent without being pinned
    assert sum(forward["blocking"].values()) == expected_waits, forward["blocking"]
    if case != "inference":
        assert (many["backward"]["blocking"], many["backward"]["sent"]) == ({}, 0)


@pytest.mark.slow
def test_attention_of_a_layer_is_one_launch_forward_and_one_backward(counts):
    for precision, engine in (("32-true", "efficient"), ("bf16-mixed", "flash")):
        for case in ("masked", "generative"):
            count = counts[case, precision, SIZES[0][0]]
            assert count["forward"]["kernels"][f"{engine}_forward"] == 12
            assert count["backward"]["kernels"][f"{engine}_backward"] == 12


def test_batches_for_a_gpu_are_made_ahead_pinned_and_the_same(tiny, monkeypatch):
    from scfm.data import TokenBudgetSampler

    pinned_tensors = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned_tensors.append(tensor) or tensor.clone())

    def steps(device):
        source = MemorySource(tiny.cells, TokenBudgetSampler(tiny.cells.lengths_B.numpy(), max_tokens=300))
        return Steps([source], [0], tiny.masked, 0, stop=7, device=torch.device(device))

    plain, ahead = list(steps("cpu")), list(steps("cuda"))
    assert len(plain) == len(ahead) == 7
    assert pinned_tensors
    for (inputs, targets), (inputs_ahead, targets_ahead) in zip(plain, ahead):
        assert torch.equal(inputs.gene_ids_T, inputs_ahead.gene_ids_T)
        assert torch.equal(targets["token_N"], targets_ahead["token_N"])
        assert inputs.plan is None
        assert inputs_ahead.plan.layout is not None
        assert targets_ahead["plan"].layout is not None


def test_an_error_of_the_objective_reaches_the_loop(tiny, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)

    class Broken:
        def corrupt(self, cells, generator):
            raise RuntimeError("no such gene")

    from scfm.data import TokenBudgetSampler

    source = MemorySource(tiny.cells, TokenBudgetSampler(tiny.cells.lengths_B.numpy(), max_tokens=300))
    with pytest.raises(RuntimeError, match="no such gene"):
        next(iter(Steps([source], [0], Broken(), 0, stop=3, device=torch.device("cuda"))))


def test_a_batch_that_is_changed_drops_its_plan(tiny, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    cells = tiny.cells.select(range(4)).planned()
    assert torch.equal(cells.plan.cu_seqlens, cells.cu_seqlens.long())
    assert torch.equal(cells.replace(gene_ids_T=cells.gene_ids_T).plan.cu_seqlens, cells.plan.cu_seqlens)
    assert cells.replace(cu_seqlens=cells.cu_seqlens).plan is None
    assert cells.replace(n_known=cells.lengths_B).plan is None
    assert cells.select([1]).plan is None
    assert CellBatch.concat([cells, cells]).plan is None
    inputs, _ = sent(pinned((cells, {})), torch.device("cpu"))
    assert inputs.plan.layout is None  # a CPU needs none
    network = tiny.network.eval()
    torch.testing.assert_close(network(inputs), network(tiny.cells.select(range(4))))
