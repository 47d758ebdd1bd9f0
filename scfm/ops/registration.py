"""Operators under `torch.ops.scfm`: schemas of the plain-torch ones, fake tensors and gradients of all."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scfm.ops import flash
from scfm.ops.extension import load_cuda_extension, load_extension
from scfm.ops.reference import attention as reference

_LIBRARY = torch.library.Library("scfm", "FRAGMENT")

_BOUNDS = "Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? n_known, Tensor? key_bias, float scale"


def register() -> None:
    """Define the plain-torch operators, and give these and the compiled ones fake tensors and gradients."""
    _LIBRARY.define(
        f"torch_attention_forward(Tensor q, Tensor k, Tensor v, {_BOUNDS}, bool return_lse) -> (Tensor, Tensor)"
    )
    _LIBRARY.define(
        "torch_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
        f"{_BOUNDS}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    _LIBRARY.impl("torch_attention_forward", reference.forward, "CompositeExplicitAutograd")
    _LIBRARY.impl("torch_attention_backward", reference.backward, "CompositeExplicitAutograd")
    torch.library.register_fake("scfm::torch_attention_forward", _fake_torch_forward, lib=_LIBRARY)
    torch.library.register_fake("scfm::torch_attention_backward", _fake_torch_backward, lib=_LIBRARY)
    torch.library.register_autograd(
        "scfm::torch_attention_forward", _torch_backward, setup_context=_torch_context, lib=_LIBRARY
    )
    torch.library.register_autograd("scfm::torch_attention_backward", no_second_derivative, lib=_LIBRARY)
    _LIBRARY.define(f"flash_attention_forward(Tensor q, Tensor k, Tensor v, {_BOUNDS}) -> (Tensor, Tensor)")
    _LIBRARY.define(
        "flash_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
        f"Tensor lse, {_BOUNDS}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    _LIBRARY.impl("flash_attention_forward", flash.forward, "CompositeExplicitAutograd")
    _LIBRARY.impl("flash_attention_backward", flash.backward, "CompositeExplicitAutograd")
    _register_pair(_LIBRARY, "flash_attention", lambda q: False)
    if load_extension()[0] is not None:
        load_cuda_extension()
        register_fused(_LIBRARY, lambda q: q.is_cuda)


def register_fused(library: torch.library.Library, adds_in_any_order: Callable[[Tensor], bool]) -> None:
    """Give the compiled operators of a library fake tensors and gradients.

    Parameters
    ----------
    library
        The namespace they are in: `scfm`, or that of the emulated CUDA kernels in the tests.
    adds_in_any_order
        Whether the backward of `q` has a faster form whose sums have no fixed order, in addition to a deterministic one.
    """
    _register_pair(library, "attention", adds_in_any_order)


def _register_pair(library: torch.library.Library, name: str, adds_in_any_order: Callable[[Tensor], bool]) -> None:
    operators = getattr(torch.ops, library.ns)
    forms = {form: getattr(operators, f"{name}_{form}", None) for form in ("backward", "backward_deterministic")}

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *bounds = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        ordered = adds_in_any_order(q) and torch.are_deterministic_algorithms_enabled()
        operator = forms["backward_deterministic" if ordered else "backward"]
        assert operator is not None
        grads = operator(grad_out, grad_lse, q, k, v, out, lse, *bounds, ctx.scale)
        return *grads[:3], None, None, None, None if bounds[3] is None else grads[3], None

    forward = f"{library.ns}::{name}_forward"
    torch.library.register_fake(forward, _fake_fused_forward, lib=library)
    for form, operator in forms.items():
        if operator is not None:
            torch.library.register_fake(f"{library.ns}::{name}_{form}", _fake_fused_backward, lib=library)
            torch.library.register_autograd(f"{library.ns}::{name}_{form}", no_second_derivative, lib=library)
    torch.library.register_autograd(forward, backward, setup_context=_fused_context, lib=library)


def no_second_derivative(*_: Any) -> None:
    """Autograd of a backward operator: without it a second derivative would be zero in silence."""
    raise NotImplementedError(
        "The gradients of scfm's attention cannot be differentiated again. For a second derivative write this attention "
        'in plain torch (`torch.nn.functional.scaled_dot_product_attention`; linear attention has `backend="torch"`).'
    )


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_torch_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_lse = rest[-1]
    return _contiguous_like(q), q.new_empty((q.shape[0] if return_lse else 0, q.shape[1]), dtype=_lse_dtype(q))


def _fake_fused_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _contiguous_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty((0 if key_bias is None else k.shape[0], q.shape[1]), dtype=_lse_dtype(q))
    return _contiguous_like(q), _contiguous_like(k), _contiguous_like(v), grad_bias


def _fake_torch_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *bounds: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_gradients(q, k, v, bounds[3])


def _fake_fused_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *bounds: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_gradients(q, k, v, bounds[3])


def _torch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, n_known, key_bias, scale, _ = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k, n_known, key_bias)
    ctx.scale = scale
    ctx.has_lse = inputs[-1]
    ctx.set_materialize_grads(False)


def _torch_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *bounds = ctx.saved_tensors
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    grads = torch.ops.scfm.torch_attention_backward(
        grad_out, grad_lse if ctx.has_lse else None, q, k, v, *bounds, ctx.scale
    )
    return *grads[:3], None, None, None, None if bounds[3] is None else grads[3], None, None


def _fused_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, n_known, key_bias, scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k, n_known, key_bias)
    ctx.scale = scale
    ctx.set_materialize_grads(False)
