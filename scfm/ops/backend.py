"""The choice of a backend for a call."""

# Axes: T packed tokens, H heads, K head width.

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from scfm.ops import torch_kernels
from scfm.ops.device_record import Case, Passed, proven_cases
from scfm.ops.extension import load_cuda_extension, load_extension

# Loaded once, at import: a graph that is being traced cannot access the file system.
EXTENSION_PATH, EXTENSION_REASON = load_extension()
CUDA_PATH, CUDA_REASON = load_cuda_extension()
PROVEN = proven_cases()

# "auto" uses the fused kernels for every case that they support. Speed over plain torch on one core, both limited to one
# instruction set, forward and forward + backward, head width 64, cells of 256 tokens | of 1,024:
#
#               float32                    bfloat16                   float16
# portable      1.41, 1.76 | 1.27, 1.59    1.54, 1.75 | 1.42, 1.62    1.75, 1.63 | 1.56, 1.62
# avx2          1.24, 1.87 | 1.20, 2.26    1.37, 1.98 | 1.30, 1.87    1.11, 1.78 | 1.27, 1.91
# avx512        1.36, 2.48 | 1.43, 3.32    1.79, 2.65 | 1.54, 3.08    1.21, 1.81 | 1.39, 2.57
# avx512_bf16   (float as avx512)          1.44, 1.87 | 1.25, 2.07
# amx           (float as avx512)          1.87, 5.09 | 2.01, 8.99
#
# Cells of 32 tokens and width 16 gain more, width 256 less, the generative mask twice as much. Below 1, in the forward only:
# float16 of width 256 in cells of 32 (0.92 to 0.98), float32 of width 256 in cells of 1,024 on portable (0.97), bfloat16
# of width 16 in cells of 1,024 on avx512_bf16 (0.87). `benchmarks/attention.py --auto` prints the table. For another
# instruction set set SCFM_FORCE_ISA, and for torch ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS
# (without the last, torch's products still use AMX).
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_MAX_HEAD_DIM = 256


# What the CUDA kernels support; they need compute capability 8.0.
CUDA_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
CUDA_HEAD_DIMS = (32, 64, 128)
CUDA_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of torch's own kernels


def choose_backend(
    backend: str, q: Tensor, *, options: frozenset[str] = frozenset(), operator: str = "attention"
) -> str:
    """Resolve `"auto"`, and refuse calls that the kernels do not support.

    On a GPU `"auto"` uses a fused kernel only if the record of device tests has the case and it was faster there
    (:mod:`scfm.ops.device_record`). Otherwise it uses torch: its own kernels, called by :mod:`scfm.ops.torch_kernels`, or
    plain torch for float64.

    Parameters
    ----------
    backend
        `"auto"`, `"fused"` or `"torch"`.
    q
        Queries (Tq, H, K): device, dtype and head width.
    options
        Those of :data:`scfm.ops.device_record.OPTIONS` that the call uses.
    operator
        One of :data:`scfm.ops.device_record.OPERATORS`.

    Returns
    -------
    `"fused"`, `"torch"`, or (on a GPU, for `"auto"`) `"kernels"`: those of torch.

    Raises
    ------
    ValueError
        If `backend` is not a known name.
    RuntimeError
        If `"fused"` is asked for and the kernels do not support the call, with the reason.

    Warns
    -----
    UserWarning
        If `"fused"` is asked for on a GPU for a case that is not in the record.
    """
    if backend not in ("auto", "fused", "torch"):
        raise ValueError(f'`backend` is {backend!r}; it must be "auto", "fused" or "torch".')
    if backend == "torch":
        return "torch"
    on_cuda = q.device.type == "cuda"
    obstacle = _cuda_obstacle(q) if on_cuda else _obstacle(q)
    if obstacle is not None and backend == "fused":
        raise RuntimeError(f'`backend="fused"` does not support this call: {obstacle}. Pass `backend="auto"`.')
    if not on_cuda:
        return "fused" if obstacle is None else "torch"
    proof = None if obstacle is not None else _proof(q, options, operator)
    if backend == "fused":
        if proof is None:
            _warn_unproven(q.dtype, q.shape[2], options, operator)
        return "fused"
    if proof is not None and proof.is_faster(training=torch.is_grad_enabled() and q.requires_grad):
        return "fused"
    return "kernels" if operator == "attention" and q.dtype in KERNEL_DTYPES else "torch"


def explain_backend(q: Tensor) -> tuple[str, str]:
    """The code that `"auto"` uses for queries of this device, dtype and head width, and the reason in words."""
    name = choose_backend("auto", q)
    obstacle = _cuda_obstacle(q) if q.device.type == "cuda" else _obstacle(q)
    if name == "fused":
        return name, "a compiled kernel supports this dtype and head width"
    if obstacle is None:
        untested = _proof(q, frozenset(), "attention") is None
        why = (
            "has not passed its device tests on this kind of GPU" if untested else "was slower than torch in its tests"
        )
        obstacle = f"the CUDA kernel {why}"
    if name != "kernels":
        return name, obstacle
    engine = torch_kernels.engine_of(q.device, q.dtype, q.shape[2])
    if engine is None:
        return "torch", f"no kernel of torch gave the results of plain torch, and {obstacle}"
    return f"torch's {engine.name} kernels", f"their results are those of plain torch, and {obstacle}"


def _obstacle(q: Tensor) -> str | None:
    if EXTENSION_PATH is None:
        return f"the compiled extension is {EXTENSION_REASON}"
    if q.device.type != "cpu":
        return f"there is no kernel for device {q.device.type!r}"
    if q.dtype not in FUSED_DTYPES:
        return f"there is no kernel for {q.dtype}"
    if q.shape[2] > FUSED_MAX_HEAD_DIM:
        return f"the head width is {q.shape[2]}, and the kernels support up to {FUSED_MAX_HEAD_DIM}"
    return None


def _cuda_obstacle(q: Tensor) -> str | None:
    if CUDA_PATH is None:
        return f"the CUDA kernels are {CUDA_REASON}"
    if q.dtype not in CUDA_DTYPES:
        return f"there is no CUDA kernel for {q.dtype}; bfloat16 and float16 have one"
    if q.shape[2] not in CUDA_HEAD_DIMS:
        return f"the head width is {q.shape[2]}, and the CUDA kernels support 32, 64 and 128"
    capability = capability_of(q.device)
    if capability < CUDA_CAPABILITY:
        return "the GPU has compute capability {}.{}, and the CUDA kernels need 8.0".format(*capability)
    return None


def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _proof(q: Tensor, options: frozenset[str], operator: str) -> Passed | None:
    if not PROVEN:
        return None
    case = Case(dtype=CUDA_DTYPES[q.dtype], head_dim=q.shape[2], options=options, operator=operator)
    return PROVEN.get((capability_of(q.device), case))


def _warn_unproven(dtype: torch.dtype, head_dim: int, options: frozenset[str], operator: str) -> None:
    case = (dtype, head_dim, options, operator)
    if case in _WARNED or torch.compiler.is_compiling():
        return
    _WARNED.add(case)
    described = f"{operator} in {dtype} at head width {head_dim}" + "".join(f", {name}" for name in sorted(options))
    warnings.warn(
        f'`backend="fused"`: the CUDA kernel for {described} has not passed its device tests on this kind of GPU, so its '
        'results are not verified. Run `benchmarks/attention_cuda.py`, or pass `backend="auto"` for torch\'s own kernels.',
        stacklevel=4,
    )


_WARNED: set[tuple[torch.dtype, int, frozenset[str], str]] = set()
