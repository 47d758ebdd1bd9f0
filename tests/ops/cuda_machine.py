"""The CUDA kernels on the CPU: builds them for the emulated machine of csrc/cuda/emulate, once a version of the sources."""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from scfm.ops.attention import register_fused
from scfm.ops.options import check_key_bias

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
NEEDS = "needs a C++ compiler and the sources of the CUDA kernels"
AVAILABLE = COMPILER is not None and (CSRC / "cuda").is_dir()
OPERATORS = ("cuda/attention.cpp", "cuda/tile_list.cpp", "cuda/emulate/fibers.cpp", "cuda/emulate/machine.cpp")
KERNELS = ("cuda/attention_d32.cu", "cuda/attention_d64.cu", "cuda/attention_d128.cu")


def flags(csrc):
    return [
        *("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DSCFM_EMULATE"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}", f"-I{sysconfig.get_paths()['include']}"),
        *(f"-isystem{path}" for path in include_paths()),
    ]


def fingerprint(csrc, sources):
    digest = hashlib.sha256(f"{torch.__version__} {COMPILER} {sources}".encode())
    for path in sorted(
        [*csrc.glob("*.h"), *csrc.glob("cpu/*.h"), *csrc.glob("cuda/**/*.*"), *map(csrc.joinpath, sources)]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(sources, csrc=CSRC, link=()):
    """Compile and link; the result stays in the temporary folder, and other processes wait for it and share it."""
    folder = Path(tempfile.gettempdir()) / f"scfm-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{fingerprint(csrc, sources)}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=folder) as scratch:

            def compile_one(source):
                path = Path(scratch) / f"{Path(source).stem}.o"
                run([COMPILER, *flags(csrc), "-x", "c++", "-c", str(csrc / source), "-o", str(path)])
                return str(path)

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile_one, sources))
            linked = Path(scratch) / "linked.so"
            run([COMPILER, "-shared", *objects, *link, "-o", str(linked)])
            linked.replace(target)
    return target


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def build_operators(csrc=CSRC):
    return build(OPERATORS + KERNELS, csrc, [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"])


# On a machine with a GPU the same tests run on it: `benchmarks/attention_cuda.py check` sets this.
ON_GPU = "SCFM_TEST_GPU" in os.environ


def moved_as_it_lies(tensor, device):
    """A copy on a device with the strides and the offset that the tensor has here; `.to` would make packed views dense."""
    n_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((n_elements,), (1,), 0).to(device, copy=True)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class OnGpu:
    """The real operators, given and giving tensors on the CPU."""

    def __getattr__(self, name):
        operator = getattr(torch.ops.scfm, name)
        return lambda *arguments: self.call(operator, arguments)

    def call(self, operator, arguments):
        # Boundaries and n_known are integers, and stay on the host.
        moved = [
            moved_as_it_lies(a, "cuda") if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
        result = operator(*moved)
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(tensor.cpu() for tensor in result)


@functools.cache
def operators():
    """`torch.ops.scfm_emulated`: the CUDA operators on CPU tensors, with the gradients that the real ones get."""
    if ON_GPU:
        return OnGpu()
    torch.ops.load_library(str(build_operators()))
    library = torch.library.Library("scfm_emulated", "FRAGMENT")
    register_fused(library, "attention", lambda q: True)
    operators.library = library  # lives as long as the process
    return torch.ops.scfm_emulated


def bounds_of(q, k, cu_seqlens, *, cu_seqlens_k=None, n_known=None, key_bias=None, scale=None):
    """The operators' last arguments, as `scfm.ops.attention` passes them."""
    bias_TH = None if key_bias is None else check_key_bias(key_bias, k)
    return cu_seqlens, cu_seqlens_k, n_known, bias_TH, q.shape[2] ** -0.5 if scale is None else scale


def attention(q, k, v, cu_seqlens, **options):
    return operators().attention_forward(q, k, v, *bounds_of(q, k, cu_seqlens, **options))
