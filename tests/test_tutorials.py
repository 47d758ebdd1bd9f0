"""Every notebook runs from top to bottom, and is stored with its outputs."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, DeadKernelError

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run_script():
    spec = importlib.util.spec_from_file_location("tutorials_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path):
    try:
        executed = run_script().execute(path)
    except (DeadKernelError, RuntimeError, TimeoutError) as error:
        if isinstance(error, CellExecutionError):
            raise
        executed = run_script().execute(path)  # on a loaded machine a kernel may fail to start; the cells may not
    assert [cell.execution_count for cell in code_cells(executed)] == list(range(1, len(code_cells(executed)) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_with_outputs_of_one_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "python tutorials/run.py stores them"
    )
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert any(cell.outputs for cell in cells)
    assert path.stat().st_size < 1_500_000


def test_there_are_notebooks():
    assert NOTEBOOKS
