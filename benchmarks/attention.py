"""CPU attention against torch's own, peers side by side in one process.

Lengths U(512, 2048), 8 heads of width 64, half of each cell known for the generative mask. Peers take turns, so that a
machine that slows down slows all of them; the table gives medians. The roofline is measured in the same run: the rate of
multiply-adds in registers, on the unit that the kernels use for the dtype.

    python benchmarks/attention.py [--threads 2] [--tokens 6144] [--repeats 7] [--csv attention.csv]
"""

# Axes: B cells, T packed tokens, H heads, K head width, N tokens of a cell, L longest cell.

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scfm import ops

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


def medians(calls: list[Callable[[], None]], repeats: int) -> list[float]:
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            seconds[index].append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def peak_gflops(dtype: torch.dtype, threads: int) -> float:
    """Arithmetic peak of the unit that serves `dtype`, all threads, as the compiled probe measures it."""
    return torch.ops.scfm.cpu_peak_gflops(dtype == torch.bfloat16) * threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6144, help="about so many in a batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, instruction set {ops.extension_info()['isa']}")
    header = ["case", "pass", "dtype", "scfm GF/s", "of peak", "torch backend", "torch GF/s", "ratio", "goal"]
    rows = []
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for (name, direction), goals in GOALS.items():
        for dtype, column in DTYPES.items():
            case = make_case(name, dtype, options.tokens)
            backward = direction != "forward"
            flops = case.flops * (3.5 if backward else 1.0) / 1e9
            ours, theirs = medians(
                [kernel_call(case, backward=backward), torch_call(case, backward=backward)], options.repeats
            )
            share = flops / ours / peak_gflops(dtype, options.threads)
            rows.append(
                [
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
            )
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
