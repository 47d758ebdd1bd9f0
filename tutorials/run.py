"""Run notebooks from top to bottom and store their outputs.

python tutorials/run.py                        # all of them
python tutorials/run.py 01_quickstart.ipynb
"""

import sys
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path, *, seconds_per_cell: int = 3600) -> nbformat.NotebookNode:
    """Run every cell with this very interpreter (whatever kernels are installed) and return the notebook."""
    notebook = nbformat.read(path, as_version=4)
    kernels = KernelSpecManager(kernel_dirs=[])  # leaves the native one: ipykernel of this environment
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, km=manager, timeout=seconds_per_cell, startup_timeout=300, resources=resources)
    client.owns_km = True  # so that the kernel ends with the notebook
    client.execute()
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave out what changes from run to run and says nothing: progress bars, times, warnings on stderr."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(names: list[str]) -> None:
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        print(path.name, flush=True)
        nbformat.write(tidy(execute(path)), path)


if __name__ == "__main__":
    main(sys.argv[1:])
