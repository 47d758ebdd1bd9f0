"""The options of attention: what callers pass, and what the operators receive. To add one, see `csrc/README.md`."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from scfm.ops.plan import AttentionPlan, make_plan

Backend = Literal["auto", "fused", "torch"]
Function = TypeVar("Function", bound=Callable[..., Any])


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of every attention function of :mod:`scfm.ops`; see :func:`scfm.ops.attention`."""

    cu_seqlens_k: Tensor | None
    n_known: Tensor | None
    key_bias: Tensor | None
    scale: float | None
    plan: AttentionPlan | None
    backend: Backend


_NAMES = tuple(AttentionOptions.__annotations__)

# Written into the docstrings of those functions.
_TEXT = """cu_seqlens_k
        Cell boundaries of the keys, shape (B + 1,), int32 or int64, last Tk, for cross-attention. By default keys and
        queries share `cu_seqlens`.
    n_known
        Length of the context of each cell for the generative mask, shape (B,), int32 or int64. Every query attends to the
        context, and each token after the context (a target token) also to itself. Self-attention only.
    key_bias
        Added to every score of a key after scaling, shape (Tk,) or (Tk, H), any real dtype. `-inf` hides a key.
    scale
        Factor on the scores; K ** -0.5 by default.
    plan
        Result of :func:`scfm.ops.make_plan` for the same boundaries, so that they are checked once per batch and not in every
        layer. By default the function makes one.
    backend
        `"fused"` (compiled kernels), `"torch"` (plain torch), or `"auto"`. On the CPU `"auto"` uses the compiled kernels for
        every call that they support. On a GPU it uses them for the cases in which they passed their device tests and were
        faster there, and otherwise torch's own attention kernels or plain torch; `"fused"` uses the compiled kernels for all
        cases that they support, with a warning if they were not tested."""


def with_options(function: Function) -> Function:
    """Replace `{options}` in a docstring by the description of all options."""
    assert function.__doc__ is not None
    function.__doc__ = function.__doc__.replace("{options}", _TEXT)
    return function


@dataclass(frozen=True)
class OperatorOptions:
    """What every attention operator receives after its tensors, checked; the fields are the arguments of the schema.

    Attributes
    ----------
    cu_seqlens, cu_seqlens_k, n_known
        Of the plan.
    key_bias
        Shape (Tk, H), float32 (float64 for float64 queries).
    scale
        Factor on the scores.
    """

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None = None
    n_known: Tensor | None = None
    key_bias: Tensor | None = None
    scale: float = 1.0

    NAMES: ClassVar[tuple[str, ...]]
    SCHEMA: ClassVar[str]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The values in the order of the schema."""
        return tuple(getattr(self, name) for name in self.NAMES)

    @property
    def in_use(self) -> frozenset[str]:
        """Names of the options in use, as the record of device tests lists them."""
        used = {"cross": self.cu_seqlens_k, "generative": self.n_known, "key_bias": self.key_bias}
        return frozenset(name for name, value in used.items() if value is not None)


_SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float"}
OperatorOptions.NAMES = tuple(field.name for field in fields(OperatorOptions))
OperatorOptions.SCHEMA = ", ".join(f"{_SCHEMA_TYPES[str(f.type)]} {f.name}" for f in fields(OperatorOptions))


def check_options(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, options: AttentionOptions
) -> tuple[OperatorOptions, Backend]:
    """Check the options of a call against its tensors, and fill in the defaults."""
    for name in options:
        if name not in _NAMES:
            raise TypeError(f"`{name}` is not an option of attention; use one of {', '.join(_NAMES)}.")
    key_bias = options.get("key_bias")
    plan = _checked_plan(q, k, cu_seqlens, options)
    checked = OperatorOptions(
        cu_seqlens=plan.cu_seqlens,
        cu_seqlens_k=plan.cu_seqlens_k,
        n_known=plan.n_known,
        key_bias=None if key_bias is None else check_key_bias(key_bias, k),
        scale=_checked_scale(options.get("scale"), q),
    )
    return checked, options.get("backend", "auto")


def _checked_plan(q: Tensor, k: Tensor, cu_seqlens: Tensor, options: AttentionOptions) -> AttentionPlan:
    """The plan of the options if it fits the other arguments, or one made of them."""
    plan, cu_seqlens_k, n_known = options.get("plan"), options.get("cu_seqlens_k"), options.get("n_known")
    if plan is None:
        if torch.compiler.is_compiling():
            # Values cannot be read while a graph is traced; the operator checks them, on the host, when the graph runs.
            on_host = [None if bounds is None else bounds.cpu() for bounds in (cu_seqlens, cu_seqlens_k, n_known)]
            assert on_host[0] is not None
            return AttentionPlan(cu_seqlens=on_host[0], cu_seqlens_k=on_host[1], n_known=on_host[2])
        return make_plan(
            cu_seqlens, cu_seqlens_k=cu_seqlens_k, n_known=n_known, n_tokens=q.shape[0], n_tokens_k=k.shape[0]
        )
    if plan.cu_seqlens.shape != cu_seqlens.shape:
        raise ValueError(
            f"`plan` was made for {plan.n_cells} cells and `cu_seqlens` holds {cu_seqlens.shape[0] - 1}; "
            "make one plan per batch."
        )
    given = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "n_known": n_known}
    for name, tensor in given.items():
        planned = getattr(plan, name)
        if (planned is None) != (tensor is None):
            raise ValueError(
                f"`plan` was made {'without' if planned is None else 'with'} `{name}`, and the call is "
                f"{'without' if tensor is None else 'with'} it; pass the same boundaries to both."
            )
        if tensor is not None and not torch.compiler.is_compiling():
            _check_planned(name, planned, tensor)
    if torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
        # The operator checks them when the graph runs.
        return AttentionPlan(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, n_known=n_known)
    return plan


def _check_planned(name: str, planned: Tensor, given: Tensor) -> None:
    """Refuse a plan of other numbers. What is on a device is read once, for the first layer of a batch."""
    if planned is given or _AGREES.get(given) is planned:
        return
    host = given.detach().to(device="cpu", dtype=torch.int64)
    if type(host) is not Tensor or type(planned) is not Tensor:
        return  # traced tensors hold no numbers
    if not torch.equal(planned, host):
        entry = int((planned != host).nonzero()[0]) if planned.shape == host.shape else 0
        raise ValueError(
            f"`plan` was made of another `{name}`: entry {entry} is {planned[entry].tolist()} in the plan and "
            f"{host[entry].tolist()} in the call; make one plan per batch."
        )
    if given.device.type != "cpu":
        _AGREES[given] = planned


# The tensor of a plan that a tensor on a device agrees with. Boundaries are never written in place.
_AGREES = WeakIdKeyDictionary()


def check_key_bias(key_bias: Tensor, k: Tensor) -> Tensor:
    """Return the bias in shape (Tk, H)."""
    if not key_bias.is_floating_point():
        raise TypeError(f"`key_bias` holds {key_bias.dtype}; pass real floating point.")
    if key_bias.device != k.device:
        raise ValueError(f"`key_bias` is on {key_bias.device} and `k` on {k.device}; move them to one device.")
    n_tokens, n_heads = k.shape[:2]
    if key_bias.shape not in ((n_tokens,), (n_tokens, n_heads)):
        raise ValueError(
            f"`key_bias` has shape {tuple(key_bias.shape)}; it must be ({n_tokens},) or ({n_tokens}, {n_heads}): "
            "one number per key, or one per key and head."
        )
    bias = key_bias if k.dtype == torch.float64 else key_bias.float()
    return bias[:, None].expand(n_tokens, n_heads) if bias.dim() == 1 else bias


def _checked_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return float(q.shape[2] ** -0.5)
    computed = torch.float64 if q.dtype == torch.float64 else torch.float32
    largest = torch.finfo(computed).max / 2  # the kernels multiply it by log2(e)
    if not abs(scale) <= largest:  # not a number fails too
        raise ValueError(
            f"`scale` is {scale}; scores are computed in {computed}, so it must be finite and at most {largest:.3g}. "
            "Leave it out for head width ** -0.5."
        )
    return float(scale)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values whose shapes, dtypes or devices do not fit."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}; it must be (tokens, heads, head width). "
                "Pack the cells end to end."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` holds {tensor.dtype}; pass real floating point.")
        if tensor.dtype != q.dtype:
            raise TypeError(f"`{name}` holds {tensor.dtype} and `q` {q.dtype}; convert them to one dtype.")
        if tensor.device != q.device:
            raise ValueError(f"`{name}` is on {tensor.device} and `q` on {q.device}; move them to one device.")
        if tensor.shape[1:] != q.shape[1:]:
            raise ValueError(
                f"`{name}` has (heads, head width) {tuple(tensor.shape[1:])} and `q` {tuple(q.shape[1:])}; "
                "they must agree."
            )
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"`k` has {k.shape[0]} tokens and `v` {v.shape[0]}; they must agree.")
    if q.shape[2] == 0:
        raise ValueError("The head width is 0; it must be at least 1.")


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, otherwise a copy."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves a tensor without elements as it is


def autocast_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the dtype that autocast asks for."""
    device = q.device.type
    usable = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not usable or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is differentiated in forward mode."""
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation: an operator without a rule for it would return a tangent of zero."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            f"`{name}` cannot be differentiated in forward mode (`torch.func.jvp`, `jacfwd`, `hessian`). Use reverse mode "
            "(`torch.func.vjp`, `jacrev`, `backward`), or write this attention in plain torch "
            "(`torch.nn.functional.scaled_dot_product_attention`)."
        )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast off: what runs inside chooses the dtype of each product itself."""
    if torch.amp.is_autocast_available(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
