"""The kernels under the address and undefined-behavior sanitizers: one slow test that builds them again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scfm import ops

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif("SCFM_TEST_SANITIZERS" not in os.environ, reason="takes long: `make sanitize` runs it")
@pytest.mark.skipif(not ops.extension_info()["available"], reason="needs the compiled extension")
@pytest.mark.skipif(shutil.which("gcc") is None or not (ROOT / "csrc").is_dir(), reason="needs gcc and the sources")
def test_no_access_out_of_bounds_and_no_undefined_behavior(tmp_path):
    sources = tmp_path / "scfm"
    for name in ("scfm", "csrc", "tests/ops"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "host"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    environment = {
        **os.environ,
        "SCFM_SANITIZE": "1",
        "SCFM_REQUIRE_EXT": "1",
        "CXX": "g++",
        "PYTHONPATH": str(sources),
    }
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=sources, env=environment, check=True, capture_output=True)
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    environment |= {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    names = ("attention", "cross_entropy", "invariance", "keys", "linear", "linear_attention")
    tests = [f"tests/ops/test_{name}.py" for name in names]
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "fused or instruction", *tests]
    done = subprocess.run(run, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
