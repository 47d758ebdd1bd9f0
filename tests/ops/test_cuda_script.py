"""benchmarks/attention_cuda.py as far as it goes without a GPU: that it says so, and what it would check and record."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scfm.ops import device_record
from scfm.ops.device_record import Case

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
def test_it_says_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "all", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("No GPU: torch")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_step_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["measure"])
    assert "invalid choice: 'measure'" in capsys.readouterr().err


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
            return getattr(torch.ops.scfm if name.startswith("torch_") else machine.operators(), name)

    called = []

    def clock(calls, repeats):
        for name, call in calls.items():
            call()
            called.append(name)
        return {"ours": 2.0, "theirs": 3.0}

    monkeypatch.setattr(script, "milliseconds", clock)
    case = Case(dtype="float16", head_dim=32, options=frozenset({"key_bias"}), operator=operator)
    batch = script.make_batch(case, [20, 3], "cpu", 1)
    assert script.speed_of(case, batch, Operators(), backward=False) == 1.5
    assert called == ["ours", "theirs"]
    monkeypatch.setattr(script, "milliseconds", lambda calls, repeats: {"ours": 2.0, "theirs": "out of memory"})
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


def test_results_are_left_as_json(script, tmp_path):
    script.save(tmp_path / "new", "check", {"cases": []})
    assert json.loads((tmp_path / "new" / "check.json").read_text()) == {"cases": []}
