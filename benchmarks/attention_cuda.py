"""The CUDA attention kernels on a GPU: build, check, sanitize, measure, record. For the day a GPU is at hand.

    python benchmarks/attention_cuda.py all          # everything in order, the table of goals last (about 25 minutes)
    python benchmarks/attention_cuda.py build        # compile scfm._cuda in place (nvcc; no GPU needed)
    python benchmarks/attention_cuda.py baselines    # torch's ways: variable length, padded with each backend, FlexAttention
    python benchmarks/attention_cuda.py check        # every case against float64, and tests/ops/test_cuda_kernels.py on the GPU
    python benchmarks/attention_cuda.py sanitize     # compute-sanitizer, memcheck and racecheck, on small shapes
    python benchmarks/attention_cuda.py speed        # every case beside the torch route that `auto` would take
    python benchmarks/attention_cuda.py goals        # the table
    python benchmarks/attention_cuda.py record       # write what passed to scfm/ops/device_record.json

Each step takes less than ten minutes and leaves its results as JSON in --out; `record` and the last table read them.
Peers take turns within one process; times are medians. Losses are printed as plainly as wins.
"""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width, N tokens of a cell, L longest cell.

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from cuda_peers import DTYPES, Batch, key_calls, make_batch, measure_peers, milliseconds, packed_call

from scfm.ops.device_record import Case, Passed, Run, add_run, kernel_sources

ROOT = Path(__file__).parents[1]
WIDTHS = (32, 64, 128)
OPTION_SETS = [
    frozenset(names)
    for names in ((), ("generative",), ("cross",), ("key_bias",), ("generative", "key_bias"), ("cross", "key_bias"))
]
CHECK_LENGTHS = [0, 1, 20, 64, 127, 128, 129, 300, 511, 1025]
# What stage A is to reach, as time of the peer over time of the kernel (or TFLOP/s).
GOALS = {
    "ragged forward over variable length": 0.85,
    "ragged forward + backward over variable length": 0.8,
    "ragged forward over fastest padded": 1.8,
    "generative forward over fastest padded": 3.5,
    "generative forward + backward over fastest padded": 2.8,
    "generative forward over FlexAttention, mask prebuilt": 0.9,
    "equal lengths forward, TFLOP/s": 270.0,
    "equal lengths backward, TFLOP/s": 200.0,
}


def load_oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests/ops/oracle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_cases() -> list[Case]:
    kinds = itertools.product(DTYPES, WIDTHS, OPTION_SETS, ("attention", "column_sums", "deletion_effects"))
    return [Case(dtype=dtype, head_dim=width, options=options, operator=name) for dtype, width, options, name in kinds]


# ---- check ----


def oracle_results(batch: Batch, oracle: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in (batch.q, batch.k, batch.v)]
    options = dict(batch.options)
    if "key_bias" in options:
        options["key_bias"] = options["key_bias"].to(dtype).requires_grad_()
        leaves.append(options["key_bias"])
    out, lse = oracle.attention(*leaves[:3], batch.cu_seqlens, **options)
    grad_lse = torch.where(lse.isfinite(), batch.grad_lse.to(dtype), 0.0)
    grads = torch.autograd.grad([out, lse], leaves, [batch.grad_out.to(dtype), grad_lse])
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("q", "k", "v", "key_bias"), grads))}


def kernel_results(batch: Batch, operators: Any, *, deterministic: bool) -> dict[str, Tensor]:
    out, lse = operators.attention_forward(batch.q, batch.k, batch.v, *batch.bounds)
    name = "attention_backward_deterministic" if deterministic else "attention_backward"
    grad_lse = torch.where(lse.isfinite(), batch.grad_lse, 0.0)
    grads = getattr(operators, name)(batch.grad_out, grad_lse, batch.q, batch.k, batch.v, out, lse, *batch.bounds)
    named = dict(zip(("q", "k", "v", "key_bias"), grads))
    if "key_bias" not in batch.options:
        del named["key_bias"]
    return {"out": out, "lse": lse, **named}


def error_of(found: Tensor, expected: Tensor) -> float:
    if not torch.equal(found.isinf(), expected.isinf()):
        return float("inf")
    difference = (found.double() - expected.double()).masked_fill(expected.isinf(), 0.0).abs().max().item()
    return difference if difference == difference else float("inf")


def check_attention(batch: Batch, operators: Any, oracle: ModuleType) -> float:
    """Largest error over what the rule allows, of every output and gradient and both forms of the backward: at most 1."""
    expected = oracle_results(batch, oracle, torch.float64)
    plain = oracle_results(batch, oracle, batch.q.dtype)
    worst = 0.0
    for deterministic in (False, True):
        found = kernel_results(batch, operators, deterministic=deterministic)
        for name, value in expected.items():
            factor = 2.0 if name in ("out", "lse") else 3.0
            largest = value.masked_fill(value.isinf(), 0.0).abs().max().item()
            floor = 2 * torch.finfo(found[name].dtype).eps * largest
            worst = max(worst, error_of(found[name], value) / max(factor * error_of(plain[name], value), floor))
        again = kernel_results(batch, operators, deterministic=deterministic)
        names = found if deterministic else ("out", "lse")
        if not all(torch.equal(found[name], again[name]) for name in names):
            return float("inf")
    return worst


def check_key_sums(case: Case, batch: Batch, operators: Any, oracle: ModuleType) -> float:
    from scfm.ops.reference import keys as reference

    double = {name: getattr(batch, name).double() for name in ("q", "k", "v", "grad_out")}
    out, lse = oracle.attention(double["q"], double["k"], double["v"], batch.cu_seqlens, **batch.options)
    if case.operator == "column_sums":
        found = operators.attention_column_sums(batch.q, batch.k, lse.float(), *batch.bounds)
        expected = reference.column_sums(double["q"], double["k"], *batch.bounds)
    else:
        rounded = out.to(batch.q.dtype)
        tensors = (batch.grad_out, batch.q, batch.k, batch.v, rounded)
        found = operators.attention_deletion_effects(*tensors, lse.float(), *batch.bounds)
        expected = reference.deletion_effects(
            double["grad_out"], double["q"], double["k"], double["v"], rounded.double(), *batch.bounds
        )
    return error_of(found, expected) / (1e-4 * max(1.0, expected.abs().max().item()))


def check_case(
    case: Case, operators: Any, oracle: ModuleType, device: str, lengths: list[int], n_heads: int = 2
) -> float:
    batch = make_batch(case, lengths, device, n_heads)
    if case.operator == "attention":
        return check_attention(batch, operators, oracle)
    return check_key_sums(case, batch, operators, oracle)


def check(out: Path) -> bool:
    oracle, results = load_oracle(), []
    for case in all_cases():
        error = check_case(case, torch.ops.scfm, oracle, "cuda", CHECK_LENGTHS)
        results.append({**as_json(case), "error": error, "passed": error <= 1.0})
        print(f"{'pass' if error <= 1.0 else 'FAIL'}  {error:7.3f} of what is allowed  {describe(case)}", flush=True)
    hazards = run_hazards([], "cuda")
    save(out, "check", {"cases": results, "hazards": hazards})
    return hazards and all(result["passed"] for result in results)


def run_hazards(prefix: list[str], chosen: str) -> bool:
    """The tests of tests/ops/test_cuda_kernels.py with the GPU in place of the emulated machine."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    environment = {**os.environ, "SCFM_TEST_GPU": "1"}
    return (
        subprocess.run([*command, "tests/ops/test_cuda_kernels.py"], cwd=ROOT, env=environment, check=False).returncode
        == 0
    )


def sanitize(out: Path) -> bool:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on this machine: nothing checked.")
        save(out, "sanitize", {"memcheck": None, "racecheck": None})
        return False
    chosen = "(block and 64) or no_key or (column and 64)"
    results = {
        name: run_hazards([tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all"], chosen)
        for name in ("memcheck", "racecheck")
    }
    save(out, "sanitize", results)
    print(results)
    return all(results.values())


# ---- measure ----


def baselines(out: Path) -> bool:
    save(out, "baselines", measure_peers(with_kernels=False))
    return True


def speed(out: Path) -> bool:
    """Each case beside the route that `auto` would take without the kernels; `attention` in training too."""
    results = []
    for case in all_cases():
        batch = make_batch(case, [700, 1300, 512, 2048, 900, 1100, 300, 1700], "cuda")
        entry = as_json(case) | {"speed_forward": speed_of(case, batch, torch.ops.scfm, backward=False)}
        trains = case.operator == "attention"
        entry["speed_training"] = speed_of(case, batch, torch.ops.scfm, backward=True) if trains else None
        results.append(entry)
        print(describe(case), entry["speed_forward"], entry["speed_training"], flush=True)
    save(out, "speed", results)
    return True


def speed_of(case: Case, batch: Batch, operators: Any, *, backward: bool) -> float | None:
    """Time of the torch route over that of the kernels; None where one of them cannot run."""
    if case.operator == "attention":
        names = ("attention", "torch_attention" if "key_bias" in case.options else "flash_attention")
        ours, theirs = (packed_call(batch, operators, name, backward=backward) for name in names)
    else:
        ours, theirs = key_calls(case, batch, operators)
    found = milliseconds({"ours": ours, "theirs": theirs}, repeats=9)
    times = found["ours"], found["theirs"]
    return times[1] / times[0] if all(isinstance(time, float) for time in times) else None


def goals(out: Path) -> bool:
    save(out, "goals", measure_peers(with_kernels=True))
    print(goal_table(json.loads((out / "goals.json").read_text())))
    return True


def goal_table(measured: dict[str, dict[str, float | str]]) -> str:
    """The goals with what was reached and against whom; a goal without its numbers says so."""
    lines = ["| goal | baseline | wanted | reached | |", "| --- | --- | --- | --- | --- |"]
    for name, wanted in GOALS.items():
        baseline, reached = reach_of(name, measured)
        verdict = "not measured" if reached is None else "reached" if reached >= wanted else "MISSED"
        lines.append(
            f"| {name} | {baseline} | {wanted:g} | {'' if reached is None else f'{reached:.2f}'} | {verdict} |"
        )
    return "\n".join(lines)


def reach_of(goal: str, measured: dict[str, dict[str, float | str]]) -> tuple[str, float | None]:
    if goal.endswith("TFLOP/s"):
        forward, both = measured.get("equal lengths forward", {}), measured.get("equal lengths forward + backward", {})
        ours, total, flops = forward.get("kernels"), both.get("kernels"), forward.get("flops")
        if not (isinstance(ours, float) and isinstance(total, float) and isinstance(flops, float)):
            return "", None
        return "", flops / ours / 1e9 if "forward" in goal else 2.5 * flops / (total - ours) / 1e9
    title, peer = goal.split(" over ")
    times = {
        key: value for key, value in measured.get(title, {}).items() if isinstance(value, float) and key != "flops"
    }
    if peer == "fastest padded":
        peer = min((key for key in times if key.startswith("padded")), key=times.__getitem__, default=peer)
    if peer not in times or "kernels" not in times:
        return peer, None
    return peer, times[peer] / times["kernels"]


# ---- record ----


def as_json(case: Case) -> dict[str, Any]:
    return {"dtype": case.dtype, "head_dim": case.head_dim, "options": sorted(case.options), "operator": case.operator}


def describe(case: Case) -> str:
    return " ".join([case.operator, case.dtype, str(case.head_dim), *sorted(case.options)])


def save(out: Path, name: str, content: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def passed_cases(
    checked: dict[str, Any], sanitized: dict[str, Any], speeds: list[dict[str, Any]]
) -> tuple[Passed, ...]:
    """What may be recorded: nothing at all unless the hazards and the memory checker passed too."""
    if not (checked["hazards"] and sanitized["memcheck"] and sanitized["racecheck"]):
        return ()
    measured = {(s["dtype"], s["head_dim"], tuple(s["options"]), s["operator"]): s for s in speeds}
    found = []
    for entry in checked["cases"]:
        if not entry["passed"]:
            continue
        case = Case(**{k: entry[k] for k in ("dtype", "head_dim", "operator")}, options=frozenset(entry["options"]))
        times = measured.get((case.dtype, case.head_dim, tuple(entry["options"]), case.operator), {})
        speeds_of = {name: times.get(name) for name in ("speed_forward", "speed_training")}
        found.append(Passed(case=case, error=entry["error"], **speeds_of))
    return tuple(found)


def record(out: Path) -> bool:
    read = {name: json.loads((out / f"{name}.json").read_text()) for name in ("check", "sanitize", "speed")}
    passed = passed_cases(read["check"], read["sanitize"], read["speed"])
    if not passed:
        print("Nothing is recorded: the hazards, the memory checker or every case failed.")
        return False
    run = Run(
        card=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        date=datetime.date.today().isoformat(),
        ran="benchmarks/attention_cuda.py check, sanitize, speed",
        kernels=kernel_sources(ROOT / "csrc"),
        passed=passed,
    )
    add_run(run)
    print(f"{len(passed)} of {len(all_cases())} cases recorded for {run.card}.")
    return True


def build(out: Path) -> bool:
    environment = {**os.environ, "SCFM_BUILD_CUDA": "1", "SCFM_REQUIRE_EXT": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


STEPS: dict[str, Callable[[Path], bool]] = {
    "build": build,
    "baselines": baselines,
    "check": check,
    "sanitize": sanitize,
    "speed": speed,
    "record": record,
    "goals": goals,
}


def run_all(out: Path) -> bool:
    """Each step in a process of its own: the kernels that `build` makes are loaded at import."""
    results = {}
    for name in STEPS:
        start = time.monotonic()
        command = [sys.executable, __file__, name, "--out", str(out)]
        results[name] = subprocess.run(command, check=False).returncode == 0
        print(f"--- {name}: {'done' if results[name] else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
        if name in ("build", "check") and not results[name]:
            break
    return all(results.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "attention_cuda", help="where results go as JSON")
    options = parser.parse_args(arguments)
    if options.step != "build" and not torch.cuda.is_available():
        print(f"No GPU: torch {torch.__version__} sees none, so `{options.step}` checks and measures nothing.")
        return 2
    return 0 if (run_all if options.step == "all" else STEPS[options.step])(options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
