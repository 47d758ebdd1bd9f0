"""benchmarks/attention_cuda.py without a GPU: its error, and what it would check and record."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_ins
import torch

from scfm import ops
from scfm.ops import device_record, engines, torch_kernels
from scfm.ops.device_record import Case
from scfm.ops.options import OperatorOptions
from scfm.ops.reference import keys as reference

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "attention_cuda.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the benchmarks")


def load(name, path):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def script():
    path = list(sys.path)
    yield load("attention_cuda", SCRIPT)
    sys.path[:] = path


@pytest.fixture(scope="module")
def machine():
    machine = load("cuda_machine", Path(__file__).with_name("cuda_machine.py"))
    if not machine.AVAILABLE:
        pytest.skip(machine.NEEDS)
    return machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_with_the_reason(tmp_path):
    command = [sys.executable, str(SCRIPT), "all", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("No GPU: torch")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_step_is_an_error(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["measure"])
    assert "invalid choice: 'measure'" in capsys.readouterr().err


@pytest.mark.skipif(not ops.extension_info()["available"], reason="the operators come with the compiled extension")
@pytest.mark.parametrize("options", [(), ("generative", "key_bias"), ("cross",)])
def test_nothing_mixes_host_and_device(script, options):
    """Tensors without memory stand in for those on a GPU: torch refuses to mix them with others on the CPU just the same."""
    batch = script.make_batch(Case(dtype="bfloat16", head_dim=32, options=frozenset(options)), [20, 0, 65], "meta", 2)
    check, peers = sys.modules["cuda_check"], sys.modules["cuda_peers"]
    results = [check.oracle_results(batch, script.load_oracle(), torch.float64)]
    results += [check.kernel_results(batch, torch.ops.scfm, deterministic=False)]
    assert all(tensor.device.type == "meta" for result in results for tensor in result.values())
    assert results[0].keys() == results[1].keys()
    if "cross" not in options:
        calls = peers.padded_calls(batch, backward=True)
        calls["padded math"]()
    tensors = (batch.grad_out, batch.q, batch.k, batch.v)
    assert reference.column_sums(batch.q, batch.k, OperatorOptions(*batch.bounds)).device.type == "meta"
    assert reference.deletion_effects(*tensors, OperatorOptions(*batch.bounds)).device.type == "meta"


@pytest.mark.parametrize("operator", device_record.OPERATORS)
@pytest.mark.parametrize("options", [(), ("generative", "key_bias"), ("cross",)])
def test_the_check_passes_right_kernels(script, machine, operator, options):
    case = Case(dtype="float16", head_dim=32, options=frozenset(options), operator=operator)
    error = script.check_case(case, machine.operators(), script.load_oracle(), "cpu", [0, 1, 20, 65], 1)
    assert error <= 1.0


@pytest.mark.parametrize("operator", device_record.OPERATORS)
def test_the_check_fails_wrong_kernels(script, machine, operator):
    class Wrong:
        """Each result off by 3 %."""

        def __getattr__(self, name):
            function = getattr(machine.operators(), name)

            def call(*arguments):
                results = function(*arguments)
                return results * 1.03 if isinstance(results, torch.Tensor) else tuple(r * 1.03 for r in results)

            return call

    case = Case(dtype="float16", head_dim=32, operator=operator)
    assert script.check_case(case, Wrong(), script.load_oracle(), "cpu", [20, 65], 1) > 1.0


def test_all_cases_cover_the_grid_once(script):
    cases = script.all_cases()
    assert len(cases) == len(set(cases)) == 2 * 3 * 6 * 3


MEASURED = {
    "ragged forward": {"kernels": 2.0, "variable length": 1.8, "padded cudnn_attention": 5.0, "padded math": 9.0},
    "generative forward": {
        "kernels": 1.0, "padded cudnn_attention": "no kernel", "padded efficient_attention": 3.0, "padded math": 4.0,
    },
    "equal lengths forward": {"kernels": 1.0, "flops": 3e11},
    "equal lengths forward + backward": {"kernels": 4.0, "flops": 3e11},
}  # fmt: skip


@pytest.mark.parametrize("operator", device_record.OPERATORS)
def test_speed_is_the_time_of_torch_over_that_of_the_kernels(script, machine, monkeypatch, operator):
    """With a clock that knows how long each took: what is compared runs, and the ratio is the right way up."""

    class Operators:
        """Kernels of the emulated machine, the torch routes of the package."""

        def __getattr__(self, name):
            return getattr(torch.ops.scfm if name.startswith(("torch_", "kernel_")) else machine.operators(), name)

    called = []

    def clock(calls):
        for name, call in calls.items():
            call()
            called.append(name)
        return {"ours": 2.0, "theirs": 3.0}

    monkeypatch.setattr(script, "milliseconds", clock)
    monkeypatch.setattr(engines, "ATEN", stand_ins.from_definition())
    monkeypatch.setattr(torch_kernels, "_TRUSTED", {})
    case = Case(dtype="float16", head_dim=32, options=frozenset({"key_bias"}), operator=operator)
    batch = script.make_batch(case, [20, 3], "cpu", 1)
    assert script.speed_of(case, batch, Operators(), backward=False) == 1.5
    assert called == ["ours", "theirs"]
    monkeypatch.setattr(script, "milliseconds", lambda calls: {"ours": 2.0, "theirs": "out of memory"})
    assert script.speed_of(case, batch, Operators(), backward=False) is None


def test_the_table_names_baselines_and_prints_losses(script):
    lines = dict(zip(script.GOALS, script.goal_table(MEASURED).splitlines()[2:]))
    rows = {goal: [part.strip() for part in line.split("|")[2:6]] for goal, line in lines.items()}
    assert rows["ragged forward over variable length"] == ["variable length", "0.85", "0.90", "reached"]
    assert rows["ragged forward over fastest padded"] == ["padded cudnn_attention", "1.8", "2.50", "reached"]
    assert rows["generative forward over fastest padded"] == ["padded efficient_attention", "3.5", "3.00", "MISSED"]
    assert rows["ragged forward + backward over variable length"][2:] == ["", "not measured"]
    assert rows["equal lengths forward, TFLOP/s"][1:] == ["270", "300.00", "reached"]
    assert rows["equal lengths backward, TFLOP/s"][1:] == ["200", "250.00", "reached"]


def checked(passed, hazards=True):
    case = {"dtype": "bfloat16", "head_dim": 64, "options": ["generative"], "operator": "attention"}
    return {"cases": [{**case, "error": 0.7, "passed": passed}], "hazards": hazards}, case


CLEAN = {"memcheck": True, "racecheck": True}


def test_what_is_recorded(script):
    found, case = checked(True)
    (passed,) = script.passed_cases(found, CLEAN, [{**case, "speed_forward": 1.4, "speed_training": None}])
    assert passed.case == Case(dtype="bfloat16", head_dim=64, options=frozenset({"generative"}))
    assert (passed.error, passed.speed_forward, passed.speed_training) == (0.7, 1.4, None)
    (unmeasured,) = script.passed_cases(found, CLEAN, [])
    assert unmeasured.speed_forward is None


@pytest.mark.parametrize(
    ("passed", "hazards", "clean"),
    [(False, True, CLEAN), (True, False, CLEAN), (True, True, CLEAN | {"racecheck": None})],
    ids=["error too large", "a hazard fails", "memory not checked"],
)
def test_what_is_not_recorded(script, passed, hazards, clean):
    assert script.passed_cases(checked(passed, hazards)[0], clean, []) == ()


MACHINE = {"card": "a card", "capability": [9, 0], "torch": "2.11", "cuda": "13.0"}


@pytest.fixture
def here(script, monkeypatch):
    """As if on a GPU, with the kernels of today."""
    machine = MACHINE | {"kernels": device_record.kernel_sources(ROOT / "csrc")}
    monkeypatch.setattr(script, "this_machine", lambda: machine)
    return machine


def test_a_case_that_crashes_is_named_and_the_others_go_on(script, here, monkeypatch, tmp_path):
    cases, ran = script.all_cases()[:3], []

    def check_case(case, *_):
        ran.append(case)
        if case == cases[1]:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
        return 0.5

    monkeypatch.setattr(script, "all_cases", lambda: cases)
    monkeypatch.setattr(script, "check_case", check_case)
    monkeypatch.setattr(script, "run_tests", lambda chosen: True)
    monkeypatch.setattr(script, "context_is_lost", lambda: False)
    assert not script.check(tmp_path)
    found = script.load(tmp_path, "check")["results"]
    assert [entry["passed"] for entry in found["cases"]] == [True, False, True]
    assert found["cases"][1]["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    assert found["hazards"]

    # Cut off behind the first case, it goes on with the second; at its end, it starts anew.
    found["cases"], found["hazards"] = found["cases"][:1], None
    script.save(tmp_path, "check", found)
    ran.clear()
    script.check(tmp_path)
    assert ran == cases[1:]
    script.check(tmp_path)
    assert ran == cases[1:] + cases


def test_what_hangs_is_stopped_with_all_that_it_started(script, monkeypatch, tmp_path, capfd):
    late, hanging = tmp_path / "late", tmp_path / "hanging.py"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    hanging.write_text(
        f"import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('started', sys.argv[1], flush=True)\ntime.sleep(60 if sys.argv[1] == 'check' else 0)\n"
        "child.kill()\nsys.exit(sys.argv[1] == 'speed')\n"
    )
    monkeypatch.setattr(script, "__file__", str(hanging))
    assert not script.run_step("check", tmp_path, limit_s=1.0)
    assert not script.run_step("speed", tmp_path)
    assert script.run_step("goals", tmp_path)
    time.sleep(2.5)
    assert not late.exists()
    said = [line.split(" in ")[0] for line in capfd.readouterr().out.splitlines()]
    assert said == [
        "started check", "--- check: STOPPED", "started speed", "--- speed: FAILED", "started goals", "--- goals: done",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "1 of 108 cases recorded for a card"),
        (lambda found: found.pop("speed"), "lacks the results of speed"),
        (lambda found: found["racecheck"]["machine"].update(torch="2.12"), "of several machines"),
        (lambda found: [content["machine"].update(kernels="old") for content in found.values()], "other kernels"),
        (lambda found: found["memcheck"].update(results=None), "compute-sanitizer or every case failed"),
    ],
    ids=["all", "a step did not run", "two versions of torch", "kernels changed", "memory not checked"],
)
def test_a_record_is_of_one_machine_and_of_the_kernels_of_today(
    script, here, monkeypatch, tmp_path, capsys, change, why
):
    recorded = []
    monkeypatch.setattr(script, "add_run", recorded.append)
    results = {"check": checked(True)[0], "memcheck": True, "racecheck": True, "speed": []}
    found = {name: {"machine": dict(here), "date": "2026-01-01", "results": result} for name, result in results.items()}
    if change is not None:
        change(found)
    for name, content in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert script.main(["record", "--out", str(tmp_path)]) == (0 if change is None else 1)
    assert why in capsys.readouterr().out
    assert [(run.card, run.capability, run.date) for run in recorded] == (
        [("a card", (9, 0), "2026-01-01")] if change is None else []
    )


def test_the_report_is_of_what_there_is(script, here, tmp_path, capsys):
    assert script.main(["report", "--out", str(tmp_path)]) == 1
    script.save(tmp_path, "check", checked(False)[0])
    script.save(tmp_path, "baselines", MEASURED)
    assert script.main(["report", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "check: 0 of 108 cases passed" in lines
    assert any(line.startswith("FAIL    0.700 of what is allowed  attention bfloat16 64 generative") for line in lines)
    assert "memcheck: did not run" in lines
    assert lines[-len(script.GOALS) - 2 :] == script.goal_table(MEASURED).splitlines()
