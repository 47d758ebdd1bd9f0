"""A command in one file: the number of cells of a file."""

from pathlib import Path

from scfm.cli._registry import command


@command(example="scfm toy-count pbmc.h5ad")
def toy_count(data: Path, /) -> None:
    """Print the number of cells of a file.

    Parameters
    ----------
    data
        .h5ad or .zarr.
    """
    from scfm.data.files import count_rows

    print(count_rows(data))  # noqa: T201
