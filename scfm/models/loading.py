"""`scfm.load`: open a saved model, whoever saved it."""

from __future__ import annotations

from pathlib import Path

from scfm.errors import ModelFileError
from scfm.models.model import Model
from scfm.models.saving import CONFIG, is_own_directory, load_own


def load(path: str | Path) -> Model:
    """Open a model that `model.save` wrote.

    Nothing in the files is executed: configuration and vocabulary are JSON, weights are safetensors.

    Parameters
    ----------
    path
        The directory.

    Raises
    ------
    ModelFileError
        If the directory is missing, incomplete, damaged, or of a later format.

    Examples
    --------
    >>> import scfm
    >>> model = scfm.load("demo_output/model")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(f"There is no {path}. Give the directory that `model.save` wrote.")
    if not is_own_directory(path):
        raise ModelFileError(f"{path} is not a saved model: it has no scfm {CONFIG} beside its weights.")
    return load_own(path)
