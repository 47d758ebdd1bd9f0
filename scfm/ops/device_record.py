"""The record of device tests that the CUDA kernels passed; on a GPU `backend="auto"` uses only the cases in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

RECORD = Path(__file__).with_name("device_record.json")

OPERATORS = ("attention", "column_sums", "deletion_effects")
OPTIONS = ("cross", "generative", "key_bias")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a kernel was tested for. A call matches a case only if all fields are equal.

    Attributes
    ----------
    dtype, head_dim
        Name of the dtype ("bfloat16", "float16"), and head width.
    options
        Those of `OPTIONS` that the call uses.
    operator
        One of `OPERATORS`.
    """

    dtype: str
    head_dim: int
    options: frozenset[str] = frozenset()
    operator: str = "attention"

    def __post_init__(self) -> None:
        unknown = self.options - set(OPTIONS)
        if unknown or self.operator not in OPERATORS:
            raise ValueError(
                f"A case has options {sorted(self.options)} of operator {self.operator!r}; options are {OPTIONS}, "
                f"operators {OPERATORS}."
            )


@dataclass(frozen=True, kw_only=True)
class Passed:
    """One case that passed on one card.

    Attributes
    ----------
    error
        Largest error of all outputs and gradients, as a multiple of what is allowed (twice the error of plain torch in the
        same dtype, three times for gradients); at most 1.
    speed_forward, speed_training
        Time of torch over that of the kernel, forward and forward + backward; None if not measured.
    """

    case: Case
    error: float
    speed_forward: float | None = None
    speed_training: float | None = None

    def is_faster(self, *, training: bool) -> bool:
        speed = self.speed_training if training else self.speed_forward
        return speed is not None and speed >= 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the device tests: where, when, with what, and what passed.

    Attributes
    ----------
    kernels
        :func:`kernel_sources` of what ran. Only runs with the kernels of the latest run count, and a test compares those
        with the current sources.
    """

    card: str
    capability: tuple[int, int]
    torch: str
    cuda: str
    date: str
    ran: str
    kernels: str
    passed: tuple[Passed, ...] = field(default=())


def kernel_sources(csrc: Path) -> str:
    """Digest of all sources that determine what the kernels compute: after a change the device tests must run again."""
    digest = hashlib.sha256()
    for path in sorted([*csrc.glob("*.h"), *(csrc / "cuda").glob("*.*"), csrc / "cpu/schedule.h"]):
        if path.suffix in (".h", ".cu", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_record(path: Path = RECORD) -> tuple[Run, ...]:
    """All runs, oldest first; none if there is no record."""
    if not path.exists():
        return ()
    return tuple(_run_of(entry) for entry in json.loads(path.read_text())["runs"])


def _run_of(entry: dict) -> Run:
    passed = tuple(
        Passed(case=Case(**{**item["case"], "options": frozenset(item["case"]["options"])}), **_numbers(item))
        for item in entry["passed"]
    )
    return Run(**{**entry, "capability": tuple(entry["capability"]), "passed": passed})


def _numbers(item: dict) -> dict:
    return {key: value for key, value in item.items() if key != "case"}


def add_run(run: Run, path: Path = RECORD) -> None:
    """Append a run to the record."""
    content = json.loads(path.read_text())
    entry = asdict(run)
    for item in entry["passed"]:
        item["case"]["options"] = sorted(item["case"]["options"])
    content["runs"].append(entry)
    content["about"] = content["about"].removesuffix(" Nothing has run on a GPU yet.")
    path.write_text(json.dumps(content, indent=1) + "\n")


@cache
def proven_cases(path: Path = RECORD) -> dict[tuple[tuple[int, int], Case], Passed]:
    """What passed with the kernels of the latest run, by compute capability and case; of several runs the last counts."""
    runs = read_record(path)
    current = [run for run in runs if run.kernels == runs[-1].kernels]
    return {(run.capability, passed.case): passed for run in current for passed in run.passed}
