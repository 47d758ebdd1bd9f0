"""What benchmarks/attention_cuda.py measures with: batches on a GPU, torch's ways of the same attention, and the clock."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width, N tokens of a cell, L longest cell.

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scfm.ops.device_record import Case
from scfm.ops.layout import lay_out

N_HEADS = 8
CALLS_A_TURN = 5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Batch:
    """One packed batch on a device, with everything an operator wants."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    cu_seqlens: Tensor
    lengths: list[int]
    options: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    @property
    def bounds(self) -> tuple[Any, ...]:
        options = self.options
        return self.cu_seqlens, options.get("cu_seqlens_k"), options.get("n_known"), options.get("key_bias"), self.scale

    @property
    def flops(self) -> int:
        """Useful operations of a forward."""
        keys = self.options["n_known"].tolist() if "n_known" in self.options else self.lengths
        return sum(4 * self.q.shape[1] * self.q.shape[2] * n * m for n, m in zip(self.lengths, keys))


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def make_batch(case: Case, lengths: list[int], device: str, n_heads: int = N_HEADS) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, DTYPES[case.dtype])

    lengths_k = [n // 2 + 3 for n in reversed(lengths)] if "cross" in case.options else lengths
    options = {}
    if "cross" in case.options:
        options["cu_seqlens_k"] = boundaries(lengths_k)
    if "generative" in case.options:
        options["n_known"] = torch.tensor([n // 2 for n in lengths])
    if "key_bias" in case.options:
        options["key_bias"] = torch.randn(sum(lengths_k), n_heads, generator=generator).to(device)
    n, m, width = sum(lengths), sum(lengths_k), case.head_dim
    q, grad_out = draw(n, n_heads, width), draw(n, n_heads, width)
    k, v = draw(m, n_heads, width), draw(m, n_heads, width)
    return Batch(q, k, v, grad_out, draw(n, n_heads).float(), boundaries(lengths), lengths, options)


def milliseconds(calls: dict[str, Callable[[], Any]], repeats: int = 9) -> dict[str, float | str]:
    """Median time of each call, taking turns; the reason in words where a call cannot be made.

    A turn makes a call several times, as the layers of a model do, so that the GPU need not wait for the first launch.
    """
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
        except Exception as error:  # compilers of several libraries, each with errors of its own
            found[name] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:100]
    times: dict[str, list[float]] = {name: [] for name in calls if name not in found}
    for _ in range(repeats):
        for name, taken in times.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(CALLS_A_TURN):
                calls[name]()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / CALLS_A_TURN)
    return found | {name: statistics.median(taken) for name, taken in times.items()}


def sent_layout(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a plan carries to torch's own kernels, sent once per batch as in a network."""
    cu_seqlens, cu_seqlens_k, n_known = batch.bounds[:3]
    layout = lay_out(cu_seqlens, cu_seqlens_k, n_known).to(batch.q.device)
    return layout.packed, layout.extents


def packed_call(batch: Batch, operators: Any, name: str, *, backward: bool) -> Callable[[], Any]:
    """`attention` (the kernels), `kernel_attention` (torch's own, merged) or `torch_attention` (plain torch)."""
    tensors = (batch.q, batch.k, batch.v)
    last: tuple[Any, ...] = {"torch_attention": (True,), "kernel_attention": sent_layout(batch)}.get(name, ())
    forward = getattr(operators, f"{name}_forward")
    if not backward:
        return lambda: forward(*tensors, *batch.bounds, *last)

    def call() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        torch.autograd.grad(forward(*leaves, *batch.bounds, *last)[0], leaves, batch.grad_out)

    return call


def key_calls(case: Case, batch: Batch, operators: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Column sums or deletion effects by the kernels, and in plain torch. Column sums pay for their log-sum-exp."""
    from scfm.ops.options import OperatorOptions
    from scfm.ops.reference import keys as reference

    q, k, v, grad, bounds = batch.q, batch.k, batch.v, batch.grad_out, batch.bounds
    out, lse = operators.attention_forward(q, k, v, *bounds)
    if case.operator == "deletion_effects":
        return (
            lambda: operators.attention_deletion_effects(grad, q, k, v, out, lse, *bounds),
            lambda: reference.deletion_effects(grad, q, k, v, OperatorOptions(*bounds)),
        )
    return (
        lambda: operators.attention_column_sums(q, k, operators.attention_forward(q, k, k, *bounds)[1], *bounds),
        lambda: reference.column_sums(q, k, OperatorOptions(*bounds)),
    )


def padded_calls(batch: Batch, *, backward: bool) -> dict[str, Callable[[], Any]]:
    """Padded scaled_dot_product_attention, each backend by name, with the mask that the batch needs."""
    device, longest = batch.q.device, max(batch.lengths)
    lengths_B = torch.tensor(batch.lengths, device=device)
    position_L = torch.arange(longest, device=device)
    mask = (position_L < lengths_B[:, None])[:, None, None]
    if "n_known" in batch.options:
        known_B = batch.options["n_known"].to(device)
        eye = torch.eye(longest, dtype=torch.bool, device=device)
        mask = ((position_L < known_B[:, None])[:, None] | eye)[:, None]

    def pad(tensor: Tensor) -> Tensor:
        rows = torch.nn.utils.rnn.pad_sequence(tensor.split(batch.lengths), batch_first=True)
        return rows.transpose(1, 2).contiguous().requires_grad_(backward)

    tensors, grad = [pad(tensor) for tensor in (batch.q, batch.k, batch.v)], pad(batch.grad_out).detach()

    def one(kind: SDPBackend) -> Callable[[], Any]:
        def call() -> None:
            with sdpa_kernel([kind]):
                out = scaled_dot_product_attention(*tensors, attn_mask=mask)
            if backward:
                torch.autograd.grad(out, tensors, grad)

        return call

    kinds = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return {f"padded {kind.name.lower()}": one(kind) for kind in kinds}


def varlen_call(batch: Batch, *, backward: bool) -> Callable[[], Any]:
    bounds, longest = batch.cu_seqlens.to(batch.q.device, torch.int32), max(batch.lengths)

    def call() -> None:
        from torch.nn.attention.varlen import varlen_attn

        leaves = [t.detach().requires_grad_(backward) for t in (batch.q, batch.k, batch.v)]
        out = varlen_attn(*leaves, bounds, bounds, longest, longest)
        if backward:
            torch.autograd.grad(out, leaves, batch.grad_out)

    return call


def flex_calls(batch: Batch) -> dict[str, Callable[[], Any]]:
    """Compiled FlexAttention over padded cells, its block mask made beforehand or each time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    longest, known_B = max(batch.lengths), batch.options["n_known"].to(batch.q.device)
    tensors = [
        torch.nn.utils.rnn.pad_sequence(t.split(batch.lengths), batch_first=True).transpose(1, 2).contiguous()
        for t in (batch.q, batch.k, batch.v)
    ]

    def visible(cell: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < known_B[cell]) | (query == key)

    compiled, make = torch.compile(flex_attention), torch.compile(create_block_mask)
    shape = (visible, len(batch.lengths), None, longest, longest, batch.q.device)
    prebuilt = functools.cache(lambda: make(*shape))  # at the first call: what cannot be compiled costs no other peer
    return {
        "FlexAttention, mask prebuilt": lambda: compiled(*tensors, block_mask=prebuilt()),
        "FlexAttention, mask rebuilt": lambda: compiled(*tensors, block_mask=make(*shape)),
    }


def goal_batch(name: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = [2048] * 32 if name == "equal lengths" else torch.randint(512, 2049, (48,), generator=generator).tolist()
    options = frozenset({"generative"}) if name == "generative" else frozenset()
    return make_batch(Case(dtype="bfloat16", head_dim=64, options=options), lengths, "cuda")


def measure_peers(*, with_kernels: bool) -> Iterator[tuple[str, dict[str, float | str]]]:
    """Title and times of each comparison, as soon as they are known."""
    for name, backward in itertools.product(("ragged", "generative", "equal lengths"), (False, True)):
        batch = goal_batch(name)
        calls = {"flash, merged": packed_call(batch, torch.ops.scfm, "kernel_attention", backward=backward)}
        if with_kernels:
            calls["kernels"] = packed_call(batch, torch.ops.scfm, "attention", backward=backward)
        if name != "generative":
            calls["variable length"] = varlen_call(batch, backward=backward)
        if name != "equal lengths":
            calls |= padded_calls(batch, backward=backward)
        if name == "generative" and not backward:
            calls |= flex_calls(batch)
        yield (
            f"{name} {'forward + backward' if backward else 'forward'}",
            milliseconds(calls) | {"flops": float(batch.flops)},
        )
