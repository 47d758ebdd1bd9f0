"""The CUDA library on a machine without a GPU: it compiles, keeps to its budget of registers, and loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_budget as budget
import pytest

ROOT = Path(__file__).parents[2]


NEEDS_SOURCES = pytest.mark.skipif(not budget.CUDA.is_dir(), reason="needs the sources of the CUDA kernels")
NEEDS_NVCC = pytest.mark.skipif(budget.find_nvcc() is None, reason="needs nvcc")


@pytest.mark.slow  # half a minute of compilation
@NEEDS_SOURCES
@NEEDS_NVCC
def test_every_kernel_keeps_to_its_registers_and_spills_nothing_more():
    allowed = json.loads(budget.BUDGET.read_text())
    same_compiler = allowed.pop("nvcc") == budget.nvcc_release()
    found = budget.compile_all()
    assert {name: set(kernels) for name, kernels in found.items()} == {n: set(k) for n, k in allowed.items()}
    for architecture, kernels in found.items():
        for kernel, use in kernels.items():
            limit = allowed[architecture][kernel]
            assert use["spilled"] <= limit["spilled"], (architecture, kernel)
            # Another release counts registers differently; what it must not do is spill.
            assert not same_compiler or use["registers"] <= limit["registers"], (architecture, kernel)


@pytest.mark.slow  # a quarter of a minute of compilation
@NEEDS_SOURCES
@NEEDS_NVCC
def test_the_intermediate_code_assembles_for_the_latest_card_that_nvcc_knows(tmp_path):
    """What the driver does with it on cards later than Hopper; the widest kernels have the fewest registers to spare."""
    known = subprocess.run([budget.find_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    latest = max(re.findall(r"^sm_(\d+)$", known, re.MULTILINE), key=int)
    command = [budget.find_nvcc(), "-std=c++17", "-O3", "-gencode", f"arch=compute_80,code=sm_{latest}", "-cubin"]
    command += [str(budget.CUDA / "attention_d128.cu"), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert int(latest) > 90
    assert done.returncode == 0, done.stderr


@NEEDS_SOURCES
def test_the_budget_leaves_room_for_the_blocks_that_the_kernels_are_made_for():
    allowed = json.loads(budget.BUDGET.read_text())
    for architecture in budget.ARCHITECTURES:
        assert len(allowed[architecture]) == 3 * (
            2 * 11 + 1
        )  # three widths; eleven kernels for each dtype, one for float16 alone
        for kernel, limit in allowed[architecture].items():
            # A few words at width 128 on Hopper, outside the loops' products; more would be a mistake.
            assert limit["spilled"] <= (64 if "128" in kernel else 0), kernel
            # 65,536 registers a multiprocessor: two blocks of 128 threads, or one of 256.
            assert limit["registers"] <= 255, kernel


@NEEDS_SOURCES
def test_device_code_reaches_the_machine_through_its_header_only():
    """Else it would not be the same code that the emulated machine runs. And no unit includes torch."""
    shared = [*budget.CUDA.glob("attention_*.h"), budget.CUDA / "tiles.h"]
    assert len(shared) >= 6
    for path in shared:
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\basm\b|__\w+__|__\w+\(|threadIdx|blockIdx|\*static_cast|\*reinterpret_cast", code), (
            path.name
        )
    for path in [*shared, *budget.CUDA.glob("*.cu"), budget.CUDA / "launch.h", budget.CUDA / "device.h"]:
        assert not re.search(r"#include\s*[<\"]torch|\btorch::", path.read_text()), path.name


@pytest.mark.slow  # a minute of compilation
@NEEDS_SOURCES
@NEEDS_NVCC
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_library_builds_without_a_cuda_build_of_torch_and_loads(tmp_path):
    for name in ("scfm", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "SCFM_REQUIRE_EXT": "1", "SCFM_BUILD_CUDA": "1", "PYTHONPATH": str(tmp_path)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    code = (
        "import torch; from scfm import ops; info = ops.extension_info(); assert info['cuda_path'], info;"
        "names = ['forward', 'backward', 'backward_deterministic', 'column_sums', 'deletion_effects'];"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "assert all(has(f'scfm::attention_{name}', 'CUDA') for name in names);"
        "q = torch.ones(3, 1, 4); print(ops.attention(q, q, q, torch.tensor([0, 3])).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12.0"


def test_the_cuda_library_is_built_only_where_it_is_of_use_or_asked_for():
    """setup.py as a module, without running it: the rule by itself, and that what is in vain costs no other library."""
    code = """
import os, sys, setuptools, torch
setuptools.setup = lambda **_: None
sys.path.insert(0, ".")
import setup
for asked in ("", "1", "0"):
    os.environ["SCFM_BUILD_CUDA"] = asked
    for nvcc, torch.version.cuda in (("/bin/nvcc", None), ("/bin/nvcc", "13.0"), (None, "13.0")):
        setup.find_nvcc = lambda: nvcc
        print(int(setup.wants_cuda()), end="")

os.environ["SCFM_BUILD_CUDA"] = "1"
os.environ.pop("SCFM_REQUIRE_EXT", None)
setup.find_nvcc, setup.find_compiler, warnings = (lambda: None), (lambda: "c++"), []
build = setup.BuildLibraries(setuptools.Distribution())
build.extensions = [setuptools.Extension(name, sources=[]) for name in ("scfm._C", "scfm._host", "scfm._cuda")]
build._build = lambda compiler, library: print("", library.name, end="")
build.warn = warnings.append
build.run()
print("", *warnings)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "010111000 scfm._C scfm._host scfm._cuda is installed without compiled code: a GPU runs torch's own kernels. Reason:"
    )
