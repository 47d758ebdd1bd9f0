"""CPU attention against torch's own, peers side by side in one process.

Lengths U(512, 2048), 8 heads of width 64, half of each cell known for the generative mask. Peers take turns, so that a
machine that slows down slows all of them; the table gives medians. The roofline is measured in the same run: the rate of
multiply-adds in registers, on the unit that the kernels use for the dtype.

    python benchmarks/attention.py [--threads 2] [--tokens 6144] [--repeats 7] [--clock wall|cpu] [--csv attention.csv]

`--clock cpu` counts the seconds of one thread's work, for machines that others use at the same time. Two more tables:

    python benchmarks/attention.py --extras   column sums and deletion effects beside a backward; FAVOR+ beside torch and in scBERT
    python benchmarks/attention.py --auto     kernels beside `backend="torch"`, for what `backend="auto"` should take;
                                              for other processors see scfm/ops/backend.py
"""

# Axes: B cells, T packed tokens, H heads, K head width, N tokens of a cell, L longest cell.

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scfm import ops
from scfm.families import preset
from scfm.nn import Block

N_HEADS, HEAD_DIM = 8, 64
GOALS = {
    ("equal", "forward"): (2.0, 4.0),
    ("ragged", "forward"): (4.3, 9.0),
    ("generative", "forward"): (8.0, 15.0),
    ("equal", "forward + backward"): (2.0, 2.5),
    ("ragged", "forward + backward"): (4.3, 5.0),
    ("generative", "forward + backward"): (7.0, 9.0),
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass
class Case:
    """One row of the table: packed input for the kernels, padded input and mask for torch."""

    name: str
    lengths: list[int]
    qkv: Tensor
    padded: Tensor
    mask: Tensor | None
    n_known: Tensor | None

    @property
    def flops(self) -> int:
        """Useful multiply-adds of a forward, times two: what is known beforehand to be hidden or padding does not count."""
        keys = self.lengths if self.n_known is None else self.n_known.tolist()
        return sum(4 * N_HEADS * HEAD_DIM * n * k for n, k in zip(self.lengths, keys))


def make_case(name: str, dtype: torch.dtype, n_tokens: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    if name == "equal":
        lengths = [1024] * max(1, n_tokens // 1024)
    else:
        n_cells = max(2, n_tokens // 1280)
        lengths = torch.randint(512, 2049, (n_cells,), generator=generator).tolist()
    qkv = torch.randn(sum(lengths), 3, N_HEADS, HEAD_DIM, generator=generator).to(dtype)
    longest = max(lengths)
    padded = torch.zeros(len(lengths), longest, 3, N_HEADS, HEAD_DIM, dtype=dtype)
    for cell, tokens in enumerate(qkv.split(lengths)):
        padded[cell, : len(tokens)] = tokens
    length_B = torch.tensor(lengths)
    position_L = torch.arange(longest)
    mask, n_known = None, None
    if name == "ragged":
        mask = (position_L < length_B[:, None])[:, None, None]
    elif name == "generative":
        n_known = length_B // 2
        mask = (position_L < n_known[:, None])[:, None].expand(-1, longest, -1) | torch.eye(longest, dtype=torch.bool)
        mask = mask[:, None]
    return Case(name, lengths, qkv, padded, mask, n_known)


def kernel_call(case: Case, *, backward: bool) -> Callable[[], None]:
    cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32)
    plan = ops.make_plan(cu_seqlens, n_known=case.n_known)
    qkv = case.qkv.clone().requires_grad_(backward)
    grad_out = torch.randn(len(qkv), N_HEADS, HEAD_DIM).to(qkv.dtype)

    def call() -> None:
        out = ops.attention(*qkv.unbind(1), cu_seqlens, n_known=case.n_known, plan=plan, backend="fused")
        if backward:
            torch.autograd.grad(out, qkv, grad_out)

    return call


def torch_call(case: Case, *, backward: bool) -> Callable[[], None]:
    qkv = case.padded.clone().requires_grad_(backward)
    grad_out = torch.randn(qkv.shape[0], N_HEADS, qkv.shape[1], HEAD_DIM).to(qkv.dtype)

    def call() -> None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = scaled_dot_product_attention(q, k, v, attn_mask=case.mask)
        if backward:
            torch.autograd.grad(out, qkv, grad_out)

    return call


def torch_backend(case: Case) -> str:
    """Name the implementation that torch chooses: the one that runs when it alone is allowed."""
    q, k, v = case.padded[:1].permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if case.mask is None else case.mask[:1]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        try:
            scaled_dot_product_attention(q, k, v, attn_mask=mask)
        except RuntimeError:
            return "math"
    return "flash"


def medians(
    calls: list[Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for index, call in enumerate(calls):
            start = clock()
            call()
            seconds[index].append(clock() - start)
    return [statistics.median(times) for times in seconds]


def peak_gflops(dtype: torch.dtype, threads: int) -> float:
    """Arithmetic peak of the unit that serves `dtype`, all threads, as the compiled probe measures it."""
    return torch.ops.scfm.cpu_peak_gflops(dtype == torch.bfloat16) * threads


def goal_rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[list[str]]:
    yield ["case", "pass", "dtype", "scfm GF/s", "of peak", "torch backend", "torch GF/s", "ratio", "goal"]
    for (name, direction), goals in GOALS.items():
        for dtype, column in DTYPES.items():
            case = make_case(name, dtype, options.tokens)
            backward = direction != "forward"
            flops = case.flops * (3.5 if backward else 1.0) / 1e9
            calls = [kernel_call(case, backward=backward), torch_call(case, backward=backward)]
            ours, theirs = medians(calls, options.repeats, clock)
            share = flops / ours / peak_gflops(dtype, options.threads)
            yield [
                name,
                direction,
                str(dtype).removeprefix("torch."),
                f"{flops / ours:.0f}",
                f"{share:.0%}",
                torch_backend(case),
                f"{flops / theirs:.0f}",
                f"{theirs / ours:.2f}",
                f"{goals[column]:.1f}",
            ]


def extra_rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[list[str]]:
    """What only this package has, in milliseconds beside something known."""
    yield ["what", "dtype", "ms", "beside", "ms", "share"]
    for dtype in DTYPES:
        case = make_case("ragged", dtype, options.tokens)
        cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32)
        q, k, v = case.qkv.unbind(1)
        grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        out, lse = ops.attention(q, k, v, cu_seqlens, return_lse=True)
        arguments = (q, k, v, out, lse, cu_seqlens, None, None, None, HEAD_DIM**-0.5)
        calls: dict[str, Callable[[], object]] = {
            "backward": partial(torch.ops.scfm.attention_backward, grad_out, None, *arguments),
            "column sums": partial(ops.attention_scores, q, k, cu_seqlens, lse=lse),
            "deletion effects": partial(ops.deletion_effects, q, k, v, cu_seqlens, grad_out, out=out, lse=lse),
        }
        seconds = dict(zip(calls, medians(list(calls.values()), options.repeats, clock)))
        for name in ("column sums", "deletion effects"):
            yield extra_row(name, dtype, seconds[name], "backward", seconds["backward"])
    for dtype in DTYPES:
        yield from favor_rows(dtype, options, clock)


def favor_rows(dtype: torch.dtype, options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[list[str]]:
    """Linear attention of scBERT's shape (10 heads of width 64 over 200 dimensions): beside plain torch, and within a block."""
    config = preset("scbert").model_config(n_tokens=100)
    block = Block(config).eval().to(dtype)
    lengths = [options.tokens // 2] * 2
    plan = ops.make_plan(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    hidden_TD = torch.randn(sum(lengths), config.d_model).to(dtype)
    qkv = torch.randn(sum(lengths), 3, config.n_heads, config.d_head).to(dtype).requires_grad_()
    grad_out = torch.randn(sum(lengths), config.n_heads, config.d_head).to(dtype)
    projection_MK = block.attention.projection_MK

    def attend(backend: Literal["fused", "torch"], backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            q, k, v = qkv.unbind(1)
            out = ops.linear_attention(q, k, v, plan.cu_seqlens, projection_MK, plan=plan, backend=backend)
            if backward:
                torch.autograd.grad(out, qkv, grad_out)

    def forward() -> None:
        with torch.inference_mode():
            block(hidden_TD, plan)

    for name, backward in (("FAVOR+", False), ("FAVOR+ forward + backward", True)):
        calls = [partial(attend, "fused", backward), partial(attend, "torch", backward)]
        ours, theirs = medians(calls, options.repeats, clock)
        yield extra_row(name, dtype, ours, "plain torch", theirs)
    inner, whole = medians([partial(attend, "fused", False), forward], options.repeats, clock)
    yield extra_row("FAVOR+", dtype, inner, "block of scBERT", whole)


def extra_row(name: str, dtype: torch.dtype, seconds: float, peer: str, peer_seconds: float) -> list[str]:
    times = (f"{seconds * 1e3:.1f}", peer, f"{peer_seconds * 1e3:.1f}", f"{seconds / peer_seconds:.2f}")
    return [name, str(dtype).removeprefix("torch."), *times]


def auto_rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[list[str]]:
    """Speed of the kernels over `backend="torch"`: below 1, "auto" should not take them."""
    yield ["dtype", "head width", "cells", "forward", "forward + backward"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (16, 64, 256):
            for length in (32, 256, 1024):
                lengths = [length] * max(1, options.tokens // 3 // length)
                ratios = [auto_ratio(dtype, head_dim, lengths, backward, options, clock) for backward in (False, True)]
                name = str(dtype).removeprefix("torch.")
                yield [name, str(head_dim), f"{len(lengths)} of {length}", *(f"{ratio:.2f}" for ratio in ratios)]


def auto_ratio(
    dtype: torch.dtype,
    head_dim: int,
    lengths: list[int],
    backward: bool,
    options: argparse.Namespace,
    clock: Callable[[], float],
) -> float:
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    plan = ops.make_plan(cu_seqlens)
    qkv = torch.randn(sum(lengths), 3, 4, head_dim).to(dtype).requires_grad_(backward)
    grad_out = torch.randn(sum(lengths), 4, head_dim).to(dtype)

    def call(backend: Literal["fused", "torch"]) -> None:
        out = ops.attention(*qkv.unbind(1), cu_seqlens, plan=plan, backend=backend)
        if backward:
            torch.autograd.grad(out, qkv, grad_out)

    ours, theirs = medians([partial(call, "fused"), partial(call, "torch")], options.repeats, clock)
    return theirs / ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6144, help="about so many in a batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--csv", type=Path)
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--extras", dest="table", action="store_const", const=extra_rows, default=goal_rows)
    tables.add_argument("--auto", dest="table", action="store_const", const=auto_rows)
    options = parser.parse_args()
    clock = time.perf_counter
    if options.clock == "cpu":
        options.threads, clock = 1, time.process_time
    torch.set_num_threads(options.threads)
    isa = ops.extension_info()["isa"]
    print(f"torch {torch.__version__}, {options.threads} threads, {options.clock} clock, instruction set {isa}")
    rows = []
    for row in options.table(options, clock):
        rows.append(row)
        print("| " + " | ".join(row) + " |", flush=True)
        if len(rows) == 1:
            print("|" + " --- |" * len(row))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
