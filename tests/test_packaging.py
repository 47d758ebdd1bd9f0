"""What is handed out: the sdist holds every source and nothing else, the wheel the package with its types, not the tests."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git tracks: a build writes beside its sources."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout, which tells sources from strays")
    folder = tmp_path_factory.mktemp("source")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(source, hook):
    """Call a hook of the build backend; without a compiler, which wheels of pure Python are made without too."""
    script = f"import setuptools.build_meta as b; print(b.{hook}('dist'))"
    environment = {"PATH": str(source / "nothing"), "HOME": os.environ.get("HOME", "")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=source, env=environment, capture_output=True, text=True, check=True
    )
    return source / "dist" / done.stdout.split()[-1], done


def files_below(folder, *patterns):
    return {
        path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern) if path.is_file()
    }


@pytest.mark.slow
def test_the_sdist_holds_every_source_and_no_stray(source):
    (source / "csrc" / "stray.so").write_bytes(b"")
    archive, _ = build(source, "build_sdist")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames() if not opened.getmember(name).isdir()}
    wanted = files_below(source, "csrc/**/*", "scfm/**/*") - {"csrc/stray.so"} | {"setup.py", "LICENSE"}
    assert wanted - held == set()
    made = {"PKG-INFO", "setup.cfg", "pyproject.toml", "README.md", "MANIFEST.in"}
    assert {name for name in held - wanted - made if not name.startswith("single_cell_fm.egg-info/")} == set()


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_types_and_its_metadata(source):
    archive, _ = build(source, "build_wheel")
    with zipfile.ZipFile(archive) as opened:
        held = set(opened.namelist())
        info = next(name.partition("/")[0] for name in held if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(opened.read(f"{info}/METADATA").decode())
        entries = opened.read(f"{info}/entry_points.txt").decode()
    package = {name for name in held if not name.startswith(f"{info}/")}
    assert package == files_below(source, "scfm/**/*")
    assert {"scfm/py.typed", "scfm/ops/device_record.json", "scfm/shipped/blood/weights.safetensors"} <= package
    assert f"{info}/licenses/LICENSE" in held
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "scfm = scfm.cli:main" in entries


@pytest.mark.slow
def test_without_a_compiler_a_build_goes_on_and_says_so(source):
    _, done = build(source, "build_wheel")
    assert "installed without compiled code" in done.stdout + done.stderr


def test_a_part_that_lacks_something_costs_no_other_part(monkeypatch):
    """Without pybind11 the encoders are plain Python, and the operators are compiled all the same."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("SCFM_BUILD_CUDA", "0")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    found = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    missing = []
    available = found["libraries"]("g++", lambda name, error: missing.append((name, type(error).__name__)))
    assert list(available) == ["scfm._C"]
    assert missing == [("scfm._host", "ModuleNotFoundError")]


def test_every_dependency_and_extra_has_a_tested_version():
    """The Makefile installs with constraints.txt: a package that is not in it would come in any version."""
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    asked = [*PROJECT["dependencies"], *(need for extra in PROJECT["optional-dependencies"].values() for need in extra)]
    names = {
        need.split(";")[0].split("[")[0].split(">")[0].split("=")[0].strip().lower().replace("_", "-") for need in asked
    }
    assert names - {PROJECT["name"]} - pinned == set()


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    """Third-party packages named in import statements of `scfm`, against the dependencies and extras of the project."""

    def names(requirements):
        return {re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_") for requirement in requirements}

    required = names(PROJECT["dependencies"])
    optional = {name for extra in PROJECT["optional-dependencies"].values() for name in names(extra)}
    imported = set()
    for path in (ROOT / "scfm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    distributions = {"sklearn": "scikit_learn"}
    imported = {distributions.get(name, name) for name in imported - set(sys.stdlib_module_names)} - {"scfm"}
    assert imported <= required | optional
    assert required <= imported


def test_the_conda_recipe_asks_for_what_the_package_asks_for():
    conda = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    wanted = set()
    for requirement in PROJECT["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(>=.*)", requirement).groups()
        wanted.add(f"{conda.get(name, name)} {version}")
    recipe = (ROOT / "recipe" / "meta.yaml").read_text(encoding="utf-8")
    run = recipe.partition("  run:\n")[2].partition("\ntest:")[0]
    asked = {line.strip().removeprefix("- ") for line in run.splitlines() if line.strip()}
    assert asked == wanted | {"python", "leidenalg", "python-igraph"}  # the last two are the extra "leiden" of scanpy
    assert f'version = "{PROJECT["version"]}"' in recipe
