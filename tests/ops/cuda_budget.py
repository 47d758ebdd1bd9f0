"""Registers and spills of every CUDA kernel, as the assembler reports them; run as a script it writes the budget.

python tests/ops/cuda_budget.py          # compare nothing, write csrc/cuda/budget.json and print the table
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
BUDGET = CUDA / "budget.json"
# What is built: code for Ampere and later, and for Hopper.
ARCHITECTURES = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def nvcc_release():
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def kernel_name(mangled):
    """`attention_forward<BFloat16, 64, 1>` of what the assembler prints."""
    length, rest = re.match(r"_ZN4scfm4cuda(\d+)(.*)", mangled).groups()
    name, arguments = rest[: int(length)], rest[int(length) :]
    found = re.findall(r"NS0_(?:8(BFloat16)|4(Half))E|Li(\d+)E|Lb([01])E|LNS0_7PurposeE(\d)E", arguments)
    return f"{name}<{', '.join(next(filter(None, parts)) for parts in found)}>"


def compile_one(source, architecture, folder):
    """Registers and spilled bytes of each kernel of one unit; no torch headers on the path."""
    command = [find_nvcc(), "-std=c++17", "-O3", "-Xptxas", "-v", "-gencode", ARCHITECTURES[architecture]]
    target = Path(folder) / f"{source.stem}_{architecture}.cubin"
    done = subprocess.run(
        [*command, "-cubin", str(source), "-o", str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return {
        kernel_name(name): {"registers": int(registers), "spilled": int(stores) + int(loads)}
        for name, stores, loads, registers in re.findall(pattern, done.stderr, re.DOTALL)
    }


def compile_all():
    units = [(source, architecture) for architecture in ARCHITECTURES for source in sorted(CUDA.glob("*.cu"))]
    found = {architecture: {} for architecture in ARCHITECTURES}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for (_, architecture), kernels in zip(units, pool.map(lambda unit: compile_one(*unit, folder), units)):
            found[architecture] |= kernels
    return found


def main():
    found = {name: dict(sorted(kernels.items())) for name, kernels in compile_all().items()}
    BUDGET.write_text(json.dumps({"nvcc": nvcc_release(), **found}, indent=1) + "\n")
    for kernel, use in found["sm_80"].items():
        hopper = found["sm_90a"][kernel]
        print(f"| {kernel} | {use['registers']} | {use['spilled']} | {hopper['registers']} | {hopper['spilled']} |")  # noqa: T201


if __name__ == "__main__":
    main()
