"""The CUDA attention kernels on a GPU: build, check, measure, sanitize, record. For the day a GPU is at hand.

    python benchmarks/attention_cuda.py all          # every step in order, the table of goals last (about 25 minutes)
    python benchmarks/attention_cuda.py build check  # or some of them, where a call may take ten minutes

    build        compile scfm._cuda in place (nvcc; needs no GPU)
    baselines    torch's ways: variable length, padded with each backend, FlexAttention
    check        every case against float64, and the kernel tests on the GPU; goes on where it was cut off
    goals        the kernels beside those baselines, in one process
    speed        every case that passed beside the torch route that `auto` would take
    memcheck     compute-sanitizer on small shapes
    racecheck    likewise
    record       write what passed to scfm/ops/device_record.json (needs no GPU, only the results)
    report       what passed, what failed and why, and the table of goals (likewise)

Several steps run in a process each, so that one which fails, hangs (nine minutes are the most) or loses the GPU's context
costs no other. Each leaves its results as JSON in --out while it goes. Nothing is fetched: torch, nvcc and pytest must be
there. Peers take turns within one process; times are medians. Losses are printed as plainly as wins.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The package may be built in place and not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from cuda_check import ROOT, all_cases, check_case, load_oracle, run_tests
from cuda_peers import Batch, key_calls, make_batch, measure_peers, milliseconds, packed_call

from scfm.ops.device_record import Case, Passed, Run, add_run, kernel_sources

STEP_LIMIT_S = 540
CHECK_LENGTHS = [0, 1, 20, 64, 127, 128, 129, 300, 511, 1025]
SPEED_LENGTHS = [700, 1300, 512, 2048, 900, 1100, 300, 1700]
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
Times = dict[str, float | str]


# ---- results ----


@functools.cache
def this_machine() -> dict[str, Any]:
    """What a result is of: results of one record must be of one card, one torch and one version of the kernels."""
    return {
        "card": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "kernels": kernel_sources(ROOT / "csrc"),
    }


def save(out: Path, name: str, results: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": this_machine(), "date": datetime.date.today().isoformat(), "results": results}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def load(out: Path, name: str) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def results_here(out: Path, name: str, otherwise: Any) -> Any:
    """Results of this machine and these kernels."""
    found = load(out, name)
    return found["results"] if found is not None and found["machine"] == this_machine() else otherwise


def as_json(case: Case) -> dict[str, Any]:
    return {"dtype": case.dtype, "head_dim": case.head_dim, "options": sorted(case.options), "operator": case.operator}


def describe(case: Case) -> str:
    return " ".join([case.operator, case.dtype, str(case.head_dim), *sorted(case.options)])


# ---- steps ----


def build(out: Path) -> bool:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "SCFM_BUILD_CUDA": "1"}, check=False)
    # What counts is that the kernels load: they may also have been built elsewhere.
    code = "from scfm.ops.extension import load_cuda_extension as load; path, why = load(); print(path, why); exit(not path)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def peers(out: Path, name: str, *, with_kernels: bool) -> bool:
    results: dict[str, Times] = {}
    for title, times in measure_peers(with_kernels=with_kernels):
        results[title] = times
        save(out, name, results)
        print(title, {peer: time for peer, time in times.items() if peer != "flops"}, flush=True)
    return all(isinstance(times.get("kernels"), float) for times in results.values()) or not with_kernels


def baselines(out: Path) -> bool:
    return peers(out, "baselines", with_kernels=False)


def goals(out: Path) -> bool:
    crashed = [entry for entry in results_here(out, "check", {"cases": []})["cases"] if "reason" in entry]
    crashed = [entry for entry in crashed if (entry["dtype"], entry["head_dim"]) == ("bfloat16", 64)]
    if crashed:
        print(
            "The kernels are left out, because they would take the baselines with them:",
            *map(verdict, crashed),
            sep="\n",
        )
    return peers(out, "goals", with_kernels=not crashed) and not crashed


def check(out: Path) -> bool:
    """Every case, then the tests. A case that crashes may leave the GPU unusable to this process: a new one goes on."""
    oracle, found = load_oracle(), results_here(out, "check", {"cases": [], "hazards": None})
    if found["hazards"] is not None:  # came to its end: this is a new run
        found = {"cases": [], "hazards": None}
    known = [(entry["dtype"], entry["head_dim"], entry["options"], entry["operator"]) for entry in found["cases"]]
    for case in all_cases():
        entry = as_json(case)
        if tuple(entry.values()) in known:
            continue
        # Stands if the case never comes back.
        found["cases"].append(entry | {"error": float("inf"), "passed": False, "reason": "did not come back"})
        save(out, "check", found)
        found["cases"][-1] = entry | outcome(case, oracle)
        save(out, "check", found)
        print(verdict(found["cases"][-1]), flush=True)
        if context_is_lost():
            os.execv(sys.executable, [sys.executable, *sys.argv])
    found["hazards"] = run_tests("cuda")
    save(out, "check", found)
    return found["hazards"] and all(entry["passed"] for entry in found["cases"])


def outcome(case: Case, oracle: Any) -> dict[str, Any]:
    try:
        error = check_case(case, torch.ops.scfm, oracle, "cuda", CHECK_LENGTHS)
    except Exception as failure:  # whatever it is, it is of this case
        return {
            "error": float("inf"),
            "passed": False,
            "reason": f"{type(failure).__name__}: {failure}".splitlines()[0][:200],
        }
    return {"error": error, "passed": error <= 1.0}


def context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def verdict(entry: dict[str, Any]) -> str:
    error = f"{entry['error']:7.3f} of what is allowed"
    return f"{'pass' if entry['passed'] else 'FAIL'}  {error}  {describe(case_of(entry))}  {entry.get('reason', '')}".rstrip()


def sanitize(out: Path, tool: str) -> bool:
    """compute-sanitizer over tests of every width, dtype, option and form, with small cells."""
    program = shutil.which("compute-sanitizer")
    clean = None
    if program is None:
        print("compute-sanitizer is not on this machine: nothing checked.")
    else:
        prefix = (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        # Without torch's cache each tensor is an allocation of its own, whose end the tool knows.
        chosen = "block or other_head or column or range or no_key"
        clean = run_tests(chosen, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    save(out, tool, clean)
    return bool(clean)


def speed(out: Path) -> bool:
    """Each case that passed beside the route that `auto` would take without the kernels; `attention` in training too."""
    results = []
    for entry in results_here(out, "check", {"cases": []})["cases"]:
        if not entry["passed"]:
            continue
        case = case_of(entry)
        batch, times = make_batch(case, SPEED_LENGTHS, "cuda"), as_json(case)
        times["speed_forward"] = speed_of(case, batch, torch.ops.scfm, backward=False)
        trains = case.operator == "attention"
        times["speed_training"] = speed_of(case, batch, torch.ops.scfm, backward=True) if trains else None
        results.append(times)
        save(out, "speed", results)
        print(verdict(entry), times["speed_forward"], times["speed_training"], flush=True)
    return bool(results)


def speed_of(case: Case, batch: Batch, operators: Any, *, backward: bool) -> float | None:
    """Time of the torch route over that of the kernels; None where one of them cannot run."""
    if case.operator == "attention":
        names = ("attention", "kernel_attention")
        ours, theirs = (packed_call(batch, operators, name, backward=backward) for name in names)
    else:
        ours, theirs = key_calls(case, batch, operators)
    found = milliseconds({"ours": ours, "theirs": theirs})
    times = found["ours"], found["theirs"]
    return times[1] / times[0] if all(isinstance(time, float) for time in times) else None


# ---- the table ----


def goal_table(measured: dict[str, Times]) -> str:
    """The goals with what was reached and against whom; a goal without its numbers says so."""
    lines = ["| goal | baseline | wanted | reached | |", "| --- | --- | --- | --- | --- |"]
    for name, wanted in GOALS.items():
        baseline, reached = reach_of(name, measured)
        verdict = "not measured" if reached is None else "reached" if reached >= wanted else "MISSED"
        lines.append(
            f"| {name} | {baseline} | {wanted:g} | {'' if reached is None else f'{reached:.2f}'} | {verdict} |"
        )
    return "\n".join(lines)


def reach_of(goal: str, measured: dict[str, Times]) -> tuple[str, float | None]:
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


# ---- record and report ----


def case_of(entry: dict[str, Any]) -> Case:
    return Case(**{k: entry[k] for k in ("dtype", "head_dim", "operator")}, options=frozenset(entry["options"]))


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
        case = case_of(entry)
        times = measured.get((case.dtype, case.head_dim, tuple(entry["options"]), case.operator), {})
        speeds_of = {name: times.get(name) for name in ("speed_forward", "speed_training")}
        found.append(Passed(case=case, error=entry["error"], **speeds_of))
    return tuple(found)


RECORDED = ("check", "memcheck", "racecheck", "speed")


def record(out: Path) -> bool:
    found = {name: load(out, name) for name in RECORDED}
    missing = [name for name, content in found.items() if content is None]
    if missing:
        print(f"Nothing is recorded: {out} lacks the results of {', '.join(missing)}.")
        return False
    machine, today = found["check"]["machine"], kernel_sources(ROOT / "csrc")
    if any(content["machine"] != machine for content in found.values()) or machine["kernels"] != today:
        print("Nothing is recorded: results are of several machines, or of other kernels than those of today.")
        return False
    checked, memcheck, racecheck, speeds = (content["results"] for content in found.values())
    passed = passed_cases(checked, {"memcheck": memcheck, "racecheck": racecheck}, speeds)
    if not passed:
        print("Nothing is recorded: the kernel tests, compute-sanitizer or every case failed.")
        return False
    ran = f"benchmarks/attention_cuda.py {', '.join(RECORDED)}"
    about = machine | {"capability": tuple(machine["capability"]), "date": found["check"]["date"], "ran": ran}
    add_run(Run(**about, passed=passed))
    print(f"{len(passed)} of {len(all_cases())} cases recorded for {machine['card']}.")
    return True


def report(out: Path) -> bool:
    """What the results in `out` say, of whatever steps ran; the table of goals last."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    if not found:
        print(f"No results in {out}.")
        return False
    results = {name: content["results"] for name, content in found.items()}
    for machine in {json.dumps(content["machine"]) for content in found.values()}:
        print(machine)
    cases = results.get("check", {"cases": []})["cases"]
    failed = [verdict(entry) for entry in cases if not entry["passed"]]
    print(f"check: {len(cases) - len(failed)} of {len(all_cases())} cases passed", *failed, sep="\n")
    print("kernel tests on the GPU:", in_words(results.get("check", {}).get("hazards")))
    print(*(f"{tool}: {in_words(results.get(tool))}" for tool in ("memcheck", "racecheck")), sep="\n")
    slower = [entry for entry in results.get("speed", []) if (entry["speed_forward"] or 0.0) < 1.0]
    print(f"speed: torch is faster forward in {len(slower)} of {len(results.get('speed', []))} measured cases")
    print(goal_table(results.get("baselines", {}) | results.get("goals", {})))
    return True


def in_words(passed: bool | None) -> str:
    return {True: "passed", False: "FAILED", None: "did not run"}[passed]


STEPS: dict[str, Callable[[Path], bool]] = {
    "build": build,
    "baselines": baselines,
    "check": check,
    "goals": goals,
    "speed": speed,
    "memcheck": functools.partial(sanitize, tool="memcheck"),
    "racecheck": functools.partial(sanitize, tool="racecheck"),
    "record": record,
    "report": report,
}
WITHOUT_GPU = ("build", "record", "report")


def run_step(name: str, out: Path, limit_s: float = STEP_LIMIT_S) -> bool:
    """In a process group of its own, so that what a step started ends with it."""
    command = [sys.executable, __file__, name, "--out", str(out)]
    start = time.monotonic()
    with subprocess.Popen(command, process_group=0, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as child:
        try:
            how = "done" if child.wait(limit_s) == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            how = "STOPPED"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    print(f"--- {name}: {how} in {time.monotonic() - start:.0f} s", flush=True)
    return how == "done"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=[*STEPS, "all"], metavar="step")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "attention_cuda", help="where results go as JSON")
    options = parser.parse_args(arguments)
    steps = list(STEPS) if "all" in options.steps else options.steps
    if not set(steps) <= set(WITHOUT_GPU) and not torch.cuda.is_available():
        print(
            f"No GPU: torch {torch.__version__} sees none, so `{' '.join(options.steps)}` checks and measures nothing."
        )
        return 2
    if len(steps) == 1:
        return 0 if STEPS[steps[0]](options.out) else 1
    done = [run_step(name, options.out) for name in steps]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
