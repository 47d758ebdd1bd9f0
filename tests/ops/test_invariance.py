"""The result of a cell is bitwise the same alone or among others, on one thread or two, with every instruction set."""

# Axes: T packed tokens, H heads, K head width.

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import accuracy
import pytest
import torch
from problems import Problem

from scfm import ops

pytestmark = pytest.mark.skipif(not ops.extension_info()["available"], reason="needs the compiled extension")

LENGTHS = [5, 700, 0, 1, 64, 2100]  # the keys of the last one are divided among tasks of the backward
KNOWN = [2, 300, 0, 0, 64, 2060]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)


def run(problem):
    return problem.run(ops.attention, return_lse=True, backend="fused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"known": KNOWN, "bias": "head"}], ids=["plain", "generative"])
def test_alone_or_among_others(make_problem, options, dtype, two_threads):
    together = make_problem(LENGTHS, dtype=dtype, **options)
    found = run(together)
    bounds = together.cu_seqlens.tolist()
    for cell, (begin, end) in enumerate(pairwise(bounds)):
        alone = make_problem([end - begin], dtype=dtype)
        for name in ("q", "k", "v", "grad_out", "grad_lse"):
            setattr(alone, name, getattr(together, name)[begin:end])
        if options:
            alone.options = {
                "n_known": together.options["n_known"][cell : cell + 1],
                "key_bias": together.options["key_bias"][begin:end],
            }
        for name, value in run(alone).items():
            assert torch.equal(value, found[name][begin:end]), (cell, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_thread_or_two(make_problem, dtype, two_threads):
    problem = make_problem(LENGTHS, dtype=dtype, known=KNOWN, bias="key")
    two = run(problem)
    torch.set_num_threads(1)
    for name, value in run(problem).items():
        assert torch.equal(value, two[name]), name


def test_one_cell_with_one_head_on_one_thread_or_two(make_problem, two_threads):
    problem = make_problem([2500], n_heads=1, head_dim=32)
    two = run(problem) | {"effects": effects(problem, "fused")}
    for n_threads in (2, 2, 1):  # of two threads, either may end last
        torch.set_num_threads(n_threads)
        again = run(problem) | {"effects": effects(problem, "fused")}
        assert all(torch.equal(again[name], value) for name, value in two.items())


def run_forced(isa, tmp_path):
    """Run this file's `main` in a separate process: the instruction set is chosen once per process."""
    target = tmp_path / f"{isa}.pt"
    environment = {**accuracy.environment("portable"), "SCFM_FORCE_ISA": isa}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(target)], env=environment, capture_output=True, text=True, check=False
    )
    return done, target


@pytest.mark.parametrize("isa", accuracy.ISAS)
def test_every_instruction_set_agrees_with_plain_torch(isa, tmp_path, make_problem):
    accuracy.skip_where_missing(isa)
    done, target = run_forced(isa, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["isa"] == isa
    for (dtype, name, found), tolerance in zip(torch.load(target), [2e-5] * 7 + [6e-2] * 7 + [8e-3] * 7):
        expected = reference_results(make_problem, dtype)[name]
        scale = expected.masked_fill(expected.isinf(), 0.0).abs().max().clamp(min=1.0)
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)


def test_an_instruction_set_that_is_not_there_is_an_error(tmp_path):
    done, _ = run_forced("sse9", tmp_path)
    assert done.returncode != 0
    assert "SCFM_FORCE_ISA names an instruction set that this machine does not have" in done.stderr


def reference_results(make_problem, dtype):
    problem = forced_problem(make_problem, dtype)
    results = problem.run(ops.attention, return_lse=True, backend="torch")
    return {name: value.float() for name, value in results.items()} | {"effects": effects(problem, "torch")}


def forced_problem(make_problem, dtype):
    return make_problem([5, 150, 0, 1, 65], n_heads=2, head_dim=48, dtype=dtype, known=[2, 80, 0, 1, 0], bias="head")


def effects(problem, backend):
    return ops.deletion_effects(
        problem.q, problem.k, problem.v, problem.cu_seqlens, problem.grad_out, **problem.options, backend=backend
    )


def main(target):
    results = []
    for dtype in DTYPES:
        problem = forced_problem(Problem, dtype)
        found = problem.run(ops.attention, return_lse=True, backend="fused")
        results += [(dtype, name, value.float()) for name, value in found.items()]
        results.append((dtype, "effects", effects(problem, "fused")))
    torch.save(results, target)
    print(json.dumps({"isa": ops.extension_info()["isa"]}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
