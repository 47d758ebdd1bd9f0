"""Which backend serves a call."""

# Axes: T packed tokens, H heads, K head width.

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from scfm.ops.device_record import Case, Passed, proven_cases
from scfm.ops.extension import load_cuda_extension, load_extension

# Read once, at import: a graph that is being traced cannot look at the file system.
EXTENSION_PATH, EXTENSION_REASON = load_extension()
CUDA_PATH, CUDA_REASON = load_cuda_extension()
PROVEN = proven_cases()

# "auto" takes the fused kernels wherever they can serve. Speed over plain torch on one core with the same instruction set
# (cells of 300 and 700 tokens, head width 64; forward, forward + backward):
#
#                 float32                       bfloat16                      float16
#                 plain        generative      plain        generative      plain        generative
# portable        1.29, 1.67   2.03, 1.86      1.48, 1.84   2.15, 2.00      1.78, 1.78   2.11, 1.80
# avx2            1.21, 2.13   2.29, 2.49      1.45, 2.37   2.51, 2.44      1.24, 3.21   2.14, 2.36
# avx512          1.47, 3.11   2.85, 3.05      0.93, 3.43   3.06, 3.59      1.43, 2.98   2.82, 2.72
# amx             (float as avx512)            1.77, 8.72   5.53, 8.40
#
# and at head widths 32, 128 and 256, plain: float32 1.34 to 1.47 forward, bfloat16 (amx) 1.81 to 1.86. Measured before the
# forward kept its reference from block to block, which made it 10 to 20 % faster. `benchmarks/attention.py --auto` prints such
# a table; for other processors set SCFM_FORCE_ISA, and ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA for torch's side.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_MAX_HEAD_DIM = 256


# Of the CUDA kernels. Below compute capability 8.0 there are none.
CUDA_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
CUDA_HEAD_DIMS = (32, 64, 128)
CUDA_CAPABILITY = (8, 0)


def choose_backend(
    backend: str, q: Tensor, *, options: frozenset[str] = frozenset(), operator: str = "attention"
) -> str:
    """Resolve `"auto"`, and refuse what cannot be served.

    On a GPU `"auto"` takes a fused kernel only for what is in the record of passed device tests and was faster there
    (:mod:`scfm.ops.device_record`), and otherwise torch: its flash kernels where they serve, called by
    :mod:`scfm.ops.flash`.

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
    `"fused"`, `"torch"`, or (on a GPU, for `"auto"`) `"flash"`.

    Raises
    ------
    ValueError
        If `backend` is not a known name.
    RuntimeError
        If `"fused"` is asked for where the kernels cannot serve, with the reason.

    Warns
    -----
    UserWarning
        If `"fused"` is asked for on a GPU for a case that the record does not hold.
    """
    if backend not in ("auto", "fused", "torch"):
        raise ValueError(f'`backend` is {backend!r}; it must be "auto", "fused" or "torch".')
    if backend == "torch":
        return "torch"
    on_cuda = q.device.type == "cuda"
    obstacle = _cuda_obstacle(q) if on_cuda else _obstacle(q)
    if obstacle is not None and backend == "fused":
        raise RuntimeError(f'`backend="fused"` cannot serve this call: {obstacle}. Pass `backend="auto"`.')
    if not on_cuda:
        return "fused" if obstacle is None else "torch"
    proof = None if obstacle is not None else _proof(q, options, operator)
    if backend == "fused":
        if proof is None:
            _warn_unproven(q.dtype, q.shape[2], options, operator)
        return "fused"
    if proof is not None and proof.is_faster(training=torch.is_grad_enabled() and q.requires_grad):
        return "fused"
    serves = operator == "attention" and q.dtype in CUDA_DTYPES and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return "flash" if serves and "key_bias" not in options else "torch"


def _obstacle(q: Tensor) -> str | None:
    if EXTENSION_PATH is None:
        return f"the compiled extension is {EXTENSION_REASON}"
    if q.device.type != "cpu":
        return f"there is no kernel for device {q.device.type!r}"
    if q.dtype not in FUSED_DTYPES:
        return f"there is no kernel for {q.dtype}"
    if q.shape[2] > FUSED_MAX_HEAD_DIM:
        return f"the head width is {q.shape[2]}, and the kernels go to {FUSED_MAX_HEAD_DIM}"
    return None


def _cuda_obstacle(q: Tensor) -> str | None:
    if CUDA_PATH is None:
        return f"the CUDA kernels are {CUDA_REASON}"
    if q.dtype not in CUDA_DTYPES:
        return f"there is no CUDA kernel for {q.dtype}; bfloat16 and float16 have one"
    if q.shape[2] not in CUDA_HEAD_DIMS:
        return f"the head width is {q.shape[2]}, and the CUDA kernels serve 32, 64 and 128"
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
        'results are unproven. Run `benchmarks/attention_cuda.py`, or pass `backend="auto"` for torch\'s own kernels.',
        stacklevel=4,
    )


_WARNED: set[tuple[torch.dtype, int, frozenset[str], str]] = set()
