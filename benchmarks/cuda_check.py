"""What benchmarks/attention_cuda.py checks: every case against float64, and the kernel tests with a GPU in place of the emulator."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width.

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cuda_peers import DTYPES, Batch, make_batch
from torch import Tensor

from scfm.ops.device_record import OPERATORS, Case

ROOT = Path(__file__).parents[1]
WIDTHS = (32, 64, 128)
OPTION_SETS = [
    frozenset(names)
    for names in ((), ("generative",), ("cross",), ("key_bias",), ("generative", "key_bias"), ("cross", "key_bias"))
]


def all_cases() -> list[Case]:
    kinds = itertools.product(DTYPES, WIDTHS, OPTION_SETS, OPERATORS)
    return [Case(dtype=dtype, head_dim=width, options=options, operator=name) for dtype, width, options, name in kinds]


def load_oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests/ops/oracle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    from scfm.ops.options import OperatorOptions
    from scfm.ops.reference import keys as reference

    double = {name: getattr(batch, name).double() for name in ("q", "k", "v", "grad_out")}
    out, lse = oracle.attention(double["q"], double["k"], double["v"], batch.cu_seqlens, **batch.options)
    if case.operator == "column_sums":
        found = operators.attention_column_sums(batch.q, batch.k, lse.float(), *batch.bounds)
        expected = reference.column_sums(double["q"], double["k"], OperatorOptions(*batch.bounds))
    else:
        rounded = out.to(batch.q.dtype)
        tensors = (batch.grad_out, batch.q, batch.k, batch.v, rounded)
        found = operators.attention_deletion_effects(*tensors, lse.float(), *batch.bounds)
        expected = reference.deletion_effects(
            double["grad_out"],
            double["q"],
            double["k"],
            double["v"],
            OperatorOptions(*batch.bounds),
            out=rounded.double(),
        )
    return error_of(found, expected) / (1e-4 * max(1.0, expected.abs().max().item()))


def check_case(
    case: Case, operators: Any, oracle: ModuleType, device: str, lengths: list[int], n_heads: int = 2
) -> float:
    batch = make_batch(case, lengths, device, n_heads)
    if case.operator == "attention":
        return check_attention(batch, operators, oracle)
    return check_key_sums(case, batch, operators, oracle)


def run_tests(chosen: str, prefix: tuple[str, ...] = (), **environment: str) -> bool:
    """The kernel tests that `chosen` selects (pytest -k), on the GPU; those of what only a GPU shows among them."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-k", chosen]
    command += ["tests/ops/test_cuda_kernels.py", "tests/ops/test_cuda_on_gpu.py"]
    environment = {**os.environ, "SCFM_TEST_GPU": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
