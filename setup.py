"""Build of the compiled parts: `scfm._C` (operators, LibTorch stable ABI), `scfm._host` (pybind11, NumPy-facing), and
`scfm._cuda` (the operators' CUDA kernels) where nvcc is found beside a CUDA build of torch, or when asked for.

Everything else about the package is in pyproject.toml. Environment variables:

SCFM_REQUIRE_EXT=1  a part that cannot be built ends the installation; without it the package falls back to pure Python
SCFM_WERROR=1       compiler warnings are errors
SCFM_SANITIZE=1     address and undefined-behavior sanitizers, for the tests (see csrc/README.md)
SCFM_BUILD_CUDA=1   build the CUDA part whatever torch is installed (0: never)
CXX                 the C++ compiler (g++ or clang++)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
# _PYTHON_HOST_PLATFORM names the platform of a cross build, such as linux-aarch64, as for CPython itself.
IS_X86 = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).lower().endswith(("x86_64", "amd64"))

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# gcc 12 warns of its own AVX-512 headers (gcc bug 105593).
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]

# One unit an instruction set, so that no instruction of a wider one leaks into code that every machine runs.
ISA_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}
# Without fused multiply-add the compiler must not contract either: each sum has one order and one rounding.
PORTABLE_FLAGS = ["-ffp-contract=off"]


def truthy(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


@dataclass
class Unit:
    source: Path
    flags: list[str] = field(default_factory=list)


@dataclass
class Library:
    """One shared library: what is compiled, and how it is linked."""

    name: str
    units: list[Unit]
    flags: list[str]
    link: list[str] = field(default_factory=list)
    limited_api: bool = False
    nvcc: str = ""


def find_compiler() -> str:
    if os.name == "nt":
        raise RuntimeError("the kernels are written for gcc and clang")
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler was found (set CXX, or install g++ or clang++)")


def knows_flags(compiler: str, flags: list[str]) -> bool:
    command = [compiler, *flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def wants_cuda() -> bool:
    """With a CPU build of torch the kernels could not run, so an nvcc that happens to be there costs nobody time."""
    if os.environ.get("SCFM_BUILD_CUDA", "") != "":
        return truthy("SCFM_BUILD_CUDA")
    if find_nvcc() is None:
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None


def python_includes() -> list[str]:
    paths = sysconfig.get_paths()
    return sorted({f"-I{paths['include']}", f"-I{paths['platinclude']}"})


def operator_library(compiler: str) -> Library:
    """`scfm._C`: schemas and scheduling, and the kernels of every instruction set that the compiler knows."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise RuntimeError(f"the kernels need torch 2.10 or later to build, this is {torch.__version__}")
    isas = {name: flags for name, flags in ISA_FLAGS.items() if IS_X86 and knows_flags(compiler, flags)}
    units = []
    for source in sorted([*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]):
        isa = next(
            (name for name in sorted(ISA_FLAGS, key=len, reverse=True) if source.stem.endswith(f"_{name}")), None
        )
        if isa is None:
            units.append(Unit(source, PORTABLE_FLAGS))
        elif isa in isas:
            units.append(Unit(source, isas[isa]))
    flags = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", *python_includes()]
    flags += [f"-isystem{path}" for path in include_paths()]
    flags += [f"-DSCFM_HAVE_{name.upper()}" for name in isas]
    link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    return Library("scfm._C", units, flags, link, limited_api=True)


def host_library() -> Library:
    """`scfm._host`: encoders of count matrices."""
    import pybind11

    units = [Unit(source) for source in sorted((CSRC / "host").glob("*.cpp"))]
    # No contraction: the compiled encoders give the bits of their NumPy twins on every machine.
    flags = ["-std=c++20", "-ffp-contract=off", f"-isystem{pybind11.get_include()}", *python_includes()]
    return Library("scfm._host", units, flags)


# Code for Ampere and later and for Hopper, and PTX that the driver compiles for what comes after.
CUDA_TARGETS = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]


def cuda_library(operators: Library) -> Library:
    """`scfm._cuda`: kernels by nvcc without torch headers, operators like those of `scfm._C`. Links no CUDA part of torch."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("the CUDA kernels were asked for (SCFM_BUILD_CUDA), and nvcc is not found; set CUDA_HOME")
    kernels = ["-std=c++17", "-O3", *(word for target in CUDA_TARGETS for word in ("-gencode", target))]
    units = [Unit(source, kernels) for source in sorted((CSRC / "cuda").glob("*.cu"))]
    units += [Unit(source) for source in sorted((CSRC / "cuda").glob("*.cpp"))]
    return Library("scfm._cuda", units, operators.flags, operators.link, limited_api=True, nvcc=nvcc)


def libraries(compiler: str, give_up: Callable[[str, Exception], None]) -> dict[str, Library]:
    """What can be compiled here. A part that lacks something, such as pybind11, costs no other part."""
    makers: dict[str, Callable[[], Library]] = {
        "scfm._C": lambda: operator_library(compiler),
        "scfm._host": host_library,
    }
    if wants_cuda():
        makers["scfm._cuda"] = lambda: cuda_library(operator_library(compiler))
    available = {}
    for name, make in makers.items():
        try:
            library = make()
        except (RuntimeError, ImportError) as error:
            give_up(name, error)
            continue
        if library.units:
            available[name] = library
    return available


def compile_all(compiler: str, library: Library, build: Path) -> list[Path]:
    # With sanitizers gcc takes minutes for a unit of -O3, and code of -O1 runs three times as long as that of -O2.
    optimize = "-O2" if truthy("SCFM_SANITIZE") else "-O3"
    common = [optimize, "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
    common += ["-Werror"] if truthy("SCFM_WERROR") else []
    common += ["-g", "-fno-omit-frame-pointer", *SANITIZE] if truthy("SCFM_SANITIZE") else []
    build.mkdir(parents=True, exist_ok=True)

    def compile_one(unit: Unit) -> Path:
        target = build / f"{unit.source.parent.name}_{unit.source.stem}.o"
        if unit.source.suffix == ".cu":
            hosts = ["-ccbin", compiler, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            run([library.nvcc, *hosts, *unit.flags, "-c", str(unit.source), "-o", str(target)])
            return target
        run([compiler, *common, *library.flags, *unit.flags, "-c", str(unit.source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_one, library.units))


SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def link_all(compiler: str, library: Library, objects: list[Path], target: Path) -> None:
    how = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    how += SANITIZE if truthy("SCFM_SANITIZE") else []
    target.parent.mkdir(parents=True, exist_ok=True)
    if library.nvcc:  # knows where its runtime is, and links it statically
        link = [word.replace("-Wl,", "-Xlinker=") for word in library.link]
        run(
            [
                library.nvcc,
                "-ccbin",
                compiler,
                "-shared",
                "-cudart",
                "static",
                *map(str, objects),
                *link,
                "-o",
                str(target),
            ]
        )
        return
    run([compiler, *how, "-pthread", *map(str, objects), *library.link, "-o", str(target)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"this command failed:\n  {' '.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)


class BuildLibraries(build_ext):
    """Builds the libraries in place of setuptools' compiler, which knows neither flags for one source nor threads."""

    def run(self) -> None:
        available: dict[str, Library] = {}
        try:
            compiler = find_compiler()
            available = libraries(compiler, self._give_up)
        except RuntimeError as error:
            self._give_up("scfm", error)
        for extension in self.extensions:
            extension.optional = True
            if extension.name in available:
                self._build(compiler, available[extension.name])
        if self.inplace:
            self.copy_extensions_to_source()

    def _build(self, compiler: str, library: Library) -> None:
        target = Path(self.get_ext_fullpath(library.name))
        if self.inplace:
            target = Path(self.build_lib) / self.get_ext_filename(library.name)
        try:
            objects = compile_all(compiler, library, Path(self.build_temp) / library.name)
            link_all(compiler, library, objects, target)
        except RuntimeError as error:
            self._give_up(library.name, error)

    def _give_up(self, what: str, error: Exception) -> None:
        if truthy("SCFM_REQUIRE_EXT"):
            raise SystemExit(f"{what} could not be built, and SCFM_REQUIRE_EXT is set: {error}")
        cuda = what == "scfm._cuda"
        instead = "a GPU runs torch's own kernels" if cuda else "everything runs in pure Python, more slowly"
        self.warn(f"{what} is installed without compiled code: {instead}. Reason: {error}")


setup(
    ext_modules=[
        Extension("scfm._C", sources=[], py_limited_api=True, optional=True),
        Extension("scfm._host", sources=[], optional=True),
        *([Extension("scfm._cuda", sources=[], py_limited_api=True, optional=True)] if wants_cuda() else []),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
