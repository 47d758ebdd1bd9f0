"""`attention`: softmax attention of packed cells, in fused kernels if they are built, otherwise in plain torch."""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from scfm.ops import torch_kernels
from scfm.ops.backend import EXTENSION_PATH, choose_backend
from scfm.ops.options import (
    AttentionOptions,
    Backend,
    OperatorOptions,
    autocast_qkv,
    check_options,
    check_qkv,
    full_precision,
    readable,
    refuse_tangents,
    with_options,
)
from scfm.ops.reference import attention as reference

__all__ = ["Backend", "attention", "no_second_derivative", "register_fused"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...


@with_options
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within each cell of a packed batch, without padding and without a mask tensor.

    Parameters
    ----------
    q, k, v
        Queries, shape (Tq, H, K), and keys and values, shape (Tk, H, K): Tq and Tk are the numbers of query and key tokens, H
        of heads, K the width of a head. All have the same real dtype. Under autocast they are cast to its dtype, except
        float64. A tensor whose last axis is contiguous, such as a view of a packed (T, 3, H, K) projection, is read without
        a copy; other tensors are copied.
    cu_seqlens
        Boundaries of the B cells in the queries, shape (B + 1,), int32 or int64, first 0, last Tq.
    return_lse
        Whether to return also the natural log-sum-exp of each query's scores, which is differentiable.
    {options}

    Returns
    -------
    The output, shape (Tq, H, K), in the dtype of `q`, or under autocast in the dtype to which `q` is cast. With `return_lse`
    also the log-sum-exp, shape (Tq, H), float32 (float64 for a float64 `q`). A query that attends to no key has output 0,
    log-sum-exp -inf and gradients 0.
    Differentiable in `q`, `k`, `v` and `key_bias`.

    Raises
    ------
    TypeError
        If dtypes differ or are not real floating point, or there is no option of a given name.
    ValueError
        If shapes, devices, boundaries or `n_known` do not fit, `scale` is not finite, or `backend` is unknown.
    RuntimeError
        If `backend` is "fused" and the kernels do not support the call.
    NotImplementedError
        If the function is differentiated in forward mode.

    Notes
    -----
    On the CPU the result of a cell is bitwise independent of the rest of the batch and of the number of threads. On a GPU the
    fused backend and torch's kernels may sum the gradients of `q` in any order, unless `torch.use_deterministic_algorithms`
    is on. They never hold the scores of a whole cell in memory (FlashAttention, Dao 2023). The generative mask is that of
    scGPT (Cui et al. 2024).

    Examples
    --------
    >>> import torch
    >>> from scfm import ops
    >>> q, k, v = torch.randn(3, 5, 2, 16)
    >>> ops.attention(q, k, v, torch.tensor([0, 2, 5])).shape
    torch.Size([5, 2, 16])
    """
    q, k, v = autocast_qkv(q, k, v)
    check_qkv(q, k, v)
    refuse_tangents("attention", q, k, v, options.get("key_bias"))
    checked, backend = check_options(q, k, cu_seqlens, options)
    call = (readable(q), readable(k), readable(v), *checked.arguments)
    name = choose_backend(backend, q, options=checked.in_use)
    if name == "fused":
        out, lse = torch.ops.scfm.attention_forward(*call)
    elif name == "kernels":
        plan = options.get("plan")
        layout = None if plan is None or plan.layout is None or plan.layout.device != q.device else plan.layout
        sent = (None, None) if layout is None else (layout.packed, layout.extents)
        out, lse = torch.ops.scfm.kernel_attention_forward(*call, *sent)
    else:
        out, lse = torch.ops.scfm.torch_attention_forward(*call, return_lse)
    return (out, lse) if return_lse else out


# Registration. This file defines the operators in plain torch and those that call torch's kernels for GPUs;
# csrc/attention.cpp defines the compiled ones. All get their fake tensors and gradients here.

_LIBRARY = torch.library.Library("scfm", "FRAGMENT")
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {OperatorOptions.SCHEMA}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {OperatorOptions.SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def register_fused(
    library: torch.library.Library,
    name: str,
    adds_in_any_order: Callable[[Tensor], bool],
    options_type: type[OperatorOptions] = OperatorOptions,
) -> None:
    """Register fake tensors and gradients for a forward operator and its backward operator.

    Parameters
    ----------
    library
        Namespace of the operators: `scfm`, or in the tests that of the emulated CUDA kernels.
    name
        Name of the operators without `_forward` and `_backward`.
    adds_in_any_order
        Whether, for a given `q`, the default backward sums the gradients of `q` in no fixed order, so that a deterministic
        form is used when torch asks for it.
    options_type
        Type that holds the options of the operators.
    """
    operators = getattr(torch.ops, library.ns)
    forms = {form: getattr(operators, f"{name}_{form}", None) for form in ("backward", "backward_deterministic")}

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), options = _saved(ctx)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        ordered = adds_in_any_order(q) and torch.are_deterministic_algorithms_enabled()
        operator = forms["backward_deterministic" if ordered else "backward"]
        assert operator is not None
        return _gradients(operator(grad_out, grad_lse, q, k, v, out, lse, *options), options, options_type)

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, (*inputs[:3], *output), inputs[3:])

    forward = f"{library.ns}::{name}_forward"
    torch.library.register_fake(forward, _fake_fused_forward, lib=library)
    for form, operator in forms.items():
        if operator is not None:
            torch.library.register_fake(f"{library.ns}::{name}_{form}", _fake_fused_backward, lib=library)
            torch.library.register_autograd(f"{library.ns}::{name}_{form}", no_second_derivative, lib=library)
    torch.library.register_autograd(forward, backward, setup_context=set_up, lib=library)


def no_second_derivative(*_: Any) -> None:
    """Raise an error for a second derivative, which without this function would silently be zero."""
    raise NotImplementedError(
        "The gradients of scfm's attention cannot be differentiated again. For a second derivative write this attention "
        'in plain torch (`torch.nn.functional.scaled_dot_product_attention`; linear attention has `backend="torch"`).'
    )


def _save(ctx: Any, tensors: tuple[Tensor, ...], options: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*tensors, *(value if isinstance(value, Tensor) else None for value in options))
    ctx.n_tensors = len(tensors)
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in options)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    saved = ctx.saved_tensors  # read only once, because activation checkpointing allows no second read
    tensors, options = saved[: ctx.n_tensors], saved[ctx.n_tensors :]
    return tensors, tuple(other if tensor is None else tensor for tensor, other in zip(options, ctx.others))


def _gradients(
    grads: tuple[Tensor, ...], options: tuple[Any, ...], options_type: type[OperatorOptions] = OperatorOptions
) -> tuple[Tensor | None, ...]:
    """Gradients of queries, keys and values, then one per option: None for all options except the key bias."""
    grad_bias = None if options_type(*options).key_bias is None else grads[3]
    return *grads[:3], *(grad_bias if name == "key_bias" else None for name in options_type.NAMES)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_fused_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _contiguous_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_torch_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_lse = rest[-1]
    return _contiguous_like(q), q.new_empty((q.shape[0] if return_lse else 0, q.shape[1]), dtype=_lse_dtype(q))


def _fake_fused_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_torch_backward(grad_out, grad_lse, q, k, v, *options[: len(OperatorOptions.NAMES)])


def _fake_torch_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_biases = 0 if OperatorOptions(*options).key_bias is None else k.shape[0]
    grad_bias = q.new_empty((n_biases, q.shape[1]), dtype=_lse_dtype(q))
    return _contiguous_like(q), _contiguous_like(k), _contiguous_like(v), grad_bias


def _torch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[:3], inputs[3:-1])
    ctx.has_lse = inputs[-1]


def _torch_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    (q, k, v), options = _saved(ctx)
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    grad_lse = grad_lse if ctx.has_lse else None
    grads = torch.ops.scfm.torch_attention_backward(grad_out, grad_lse, q, k, v, *options)
    return *_gradients(grads, options), None


def _register_torch() -> None:
    _LIBRARY.define("torch_attention_forward" + _FORWARD.replace(") ->", ", bool return_lse) ->"))
    _LIBRARY.define("torch_attention_backward" + _BACKWARD.replace(" Tensor out, Tensor lse,", ""))

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with full_precision(q.device):
            return reference.forward(q, k, v, OperatorOptions(*rest[:-1]), return_lse=rest[-1])

    def backward(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
        with full_precision(q.device):
            return reference.backward(grad_out, grad_lse, q, k, v, OperatorOptions(*options))

    _LIBRARY.impl("torch_attention_forward", forward, "CompositeExplicitAutograd")
    _LIBRARY.impl("torch_attention_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake("scfm::torch_attention_forward", _fake_torch_forward, lib=_LIBRARY)
    torch.library.register_fake("scfm::torch_attention_backward", _fake_torch_backward, lib=_LIBRARY)
    torch.library.register_autograd(
        "scfm::torch_attention_forward", _torch_backward, setup_context=_torch_context, lib=_LIBRARY
    )
    torch.library.register_autograd("scfm::torch_attention_backward", no_second_derivative, lib=_LIBRARY)


def _register_kernels() -> None:
    options_of = torch_kernels.KernelOptions
    for form, schema in (("forward", _FORWARD), ("backward", _BACKWARD)):
        _LIBRARY.define(f"kernel_attention_{form}" + schema.replace(OperatorOptions.SCHEMA, options_of.SCHEMA))

    def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with full_precision(q.device):
            return torch_kernels.forward(q, k, v, options_of(*options))

    def backward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> Any:
        q, k, v, out, lse, *options = rest
        with full_precision(q.device):
            return torch_kernels.backward(grad_out, grad_lse, q, k, v, out, lse, options_of(*options))

    _LIBRARY.impl("kernel_attention_forward", forward, "CompositeExplicitAutograd")
    _LIBRARY.impl("kernel_attention_backward", backward, "CompositeExplicitAutograd")
    register_fused(_LIBRARY, "kernel_attention", lambda q: False, options_of)


_register_torch()
_register_kernels()
if EXTENSION_PATH is not None:
    register_fused(_LIBRARY, "attention", lambda q: q.is_cuda)
