"""The accuracy rule of the kernel tests: errors against float64, compared with those of plain torch in the same dtype.

flash-attention allows a kernel twice the error of plain torch. It compares two largest errors, which are one draw each and
depend on how a processor's library sums. Here root mean squares over several draws are compared, and the largest error must be
within a bound that follows from the lengths of the sums, the rounding unit and the magnitudes.
"""

# Axes: H heads, Q queries of a cell, N its keys, K head width.

import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

from scfm import ops

FACTOR = 2.0
SEEDS = range(2)

# Limits torch to an instruction set of ours: its own kernels, MKL and oneDNN.
TORCH_LIMITS = {
    "portable": ("default", "SSE4_2", "SSE41"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512", "AVX512_CORE_BF16"),
    "amx": ("avx512", "AVX512", "AVX512_CORE_AMX"),
}
ISAS = tuple(TORCH_LIMITS)


def environment(isa):
    """The environment of a process in which the kernels and torch both use `isa`, with the same scfm as here."""
    variables = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
    limits = dict(zip(variables, TORCH_LIMITS[isa]))
    return {**os.environ, **limits, "SCFM_FORCE_ISA": isa, "PYTHONPATH": str(Path(ops.__file__).parents[2])}


def skip_where_missing(isa):
    if ISAS.index(isa) > ISAS.index(ops.extension_info()["isa"]):
        pytest.skip(f"this machine has no {isa}")


def run_with(isa, script):
    """Run a test file as a script that uses `isa`; it prints what it ran with."""
    skip_where_missing(isa)
    command = [sys.executable, script]
    done = subprocess.run(command, env=environment(isa), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == isa


def error(found, exact):
    """Difference in float64, 0 where both are infinite."""
    assert torch.equal(found.isinf(), exact.isinf())
    return (found.double() - exact).masked_fill(exact.isinf(), 0.0)


def root_mean_square(tensors):
    values = torch.cat([tensor.flatten() for tensor in tensors])
    return values.masked_fill(values.isinf(), 0.0).square().mean().sqrt().item()


def root_mean_square_error(found, exact):
    """Over a list of one tensor per draw."""
    return root_mean_square([error(one, truth) for one, truth in zip(found, exact)])


def check(found, exact, torch_error, name):
    """The rule for one result: lists of one tensor per draw, and plain torch's root mean square error."""
    # Of one rounding to nearest. Plain torch is exact by luck where a sum has one term.
    rounding = 0.3 * torch.finfo(found[0].dtype).eps * root_mean_square(exact)
    found_error = root_mean_square_error(found, exact)
    assert found_error <= FACTOR * torch_error + rounding, (name, found_error, torch_error, rounding)


def plain_torch(q, k, v, cu_seqlens, **options):
    """The oracle's formula in the dtype of `q` itself."""
    if "key_bias" in options:
        options["key_bias"] = options["key_bias"].to(q.dtype)
    return oracle.attention(q, k, v, cu_seqlens, **options)


def check_attention(problems, function, **settings):
    """Output, log-sum-exp and all gradients of `function` on several draws of one problem."""
    exact, plain, found = [], [], []
    for problem in problems:
        exact.append(problem.run(oracle.attention, torch.float64))
        plain.append(problem.run(plain_torch, problem.q.dtype))
        found.append(problem.run(function, **settings))
        for name, bound in attention_bounds(problem).items():
            excess = error(found[-1][name], exact[-1][name]).abs() - bound
            assert (excess <= 0).all(), (name, excess.max().item())
    for name in exact[0]:
        of_kernel, of_torch, truth = ([results[name] for results in one] for one in (found, plain, exact))
        check(of_kernel, truth, root_mean_square_error(of_torch, truth), name)


def attention_bounds(problem):
    """First-order bounds on the error of every result, whatever the order of the sums.

    A sum of n products is off by n units of float32 of the sum of their magnitudes, a score by `score`, a probability
    relatively by that and by the same of its normalization. `last` is the unit of the dtype: inputs of products that kernels
    round, and results.
    """
    unit, last = torch.finfo(torch.float32).eps / 2, torch.finfo(problem.q.dtype).eps / 2
    options, bounds = problem.options, problem.cu_seqlens.tolist()
    bounds_k = options.get("cu_seqlens_k", problem.cu_seqlens).tolist()
    width = problem.q.shape[2]
    scale = options.get("scale", width**-0.5)
    cells = {name: [] for name in ("out", "lse", "q", "k", "v", "key_bias")}
    for cell in range(len(bounds) - 1):
        queries, keys = slice(*bounds[cell : cell + 2]), slice(*bounds_k[cell : cell + 2])
        query_HQK, grad_HQK = (t[queries].double().transpose(0, 1) for t in (problem.q, problem.grad_out))
        key_HNK, value_HNK = (t[keys].double().transpose(0, 1) for t in (problem.k, problem.v))
        n_terms = max(query_HQK.shape[1], key_HNK.shape[1]) + 8
        score_HQN, size_HQN = scale * query_HQK @ key_HNK.mT, abs(scale) * query_HQK.abs() @ key_HNK.abs().mT
        if "key_bias" in options:
            bias = options["key_bias"][keys].double()
            bias_H1N = (bias[:, None] if bias.dim() == 1 else bias).T[:, None]
            score_HQN, size_HQN = score_HQN + bias_H1N, size_HQN + bias_H1N.abs()
        known = options.get("n_known")
        mask_QN = oracle.visible(query_HQK.shape[1], key_HNK.shape[1], None if known is None else int(known[cell]))
        score_HQN = score_HQN.masked_fill(~mask_QN, -torch.inf)
        lse_HQ1 = torch.logsumexp(score_HQN, -1, keepdim=True).nan_to_num(neginf=0.0)
        prob_HQN = torch.exp(score_HQN - lse_HQ1)
        score_error = unit * (width + 8) * (size_HQN + lse_HQ1.abs() + 1)
        sum_error = (prob_HQN * score_error).sum(-1, keepdim=True) + n_terms * unit
        prob_error = prob_HQN * (score_error + sum_error + 8 * unit + last)
        out_HQK = prob_HQN @ value_HNK
        out_error = prob_error @ value_HNK.abs() + n_terms * unit * prob_HQN @ value_HNK.abs() + last * out_HQK.abs()
        cells["out"].append(out_error.transpose(0, 1))
        cells["lse"].append((sum_error + 4 * unit * (lse_HQ1.abs() + 1))[..., 0].T)

        grad_lse_HQ1 = problem.grad_lse[queries].double().T[..., None]
        moved_HQN = grad_HQK @ value_HNK.mT - (grad_HQK * out_HQK).sum(-1, keepdim=True) + grad_lse_HQ1
        moved_error = (width + 8) * unit * (
            grad_HQK.abs() @ value_HNK.abs().mT + (grad_HQK * out_HQK).abs().sum(-1, keepdim=True) + grad_lse_HQ1.abs()
        ) + (grad_HQK.abs() * out_error).sum(-1, keepdim=True)
        grad_HQN = prob_HQN * moved_HQN
        grad_error = prob_error * moved_HQN.abs() + prob_HQN * moved_error + (last + 2 * unit) * grad_HQN.abs()
        grad_error = grad_error + n_terms * unit * grad_HQN.abs()  # of the sums that follow
        for name, error_of_factor, other, result in (
            ("q", abs(scale) * grad_error, key_HNK, scale * grad_HQN @ key_HNK),
            ("k", abs(scale) * grad_error.mT, query_HQK, scale * grad_HQN.mT @ query_HQK),
            ("v", (prob_error + n_terms * unit * prob_HQN).mT, grad_HQK, prob_HQN.mT @ grad_HQK),
        ):
            cells[name].append((error_of_factor @ other.abs() + last * result.abs()).transpose(0, 1))
        cells["key_bias"].append(grad_error.sum(1).T)
    found = {name: torch.cat(parts) for name, parts in cells.items()}
    if "key_bias" not in options:
        del found["key_bias"]
    elif options["key_bias"].dim() == 1:
        found["key_bias"] = found["key_bias"].sum(1)
    # Terms of second order, and numbers too small for the dtype.
    return {name: 1.1 * bound + torch.finfo(problem.q.dtype).tiny for name, bound in found.items()}
