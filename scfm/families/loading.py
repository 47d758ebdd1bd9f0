"""`scfm.load` reads saved models and published checkpoints, and `convert` converts between their formats."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from scfm._docs import document
from scfm.errors import ModelFileError
from scfm.families._checkpoint import CheckpointFiles
from scfm.families.base import FAMILIES, Family
from scfm.models.device import resolved_device
from scfm.models.io.dictionaries import Source
from scfm.models.io.hub import fetched
from scfm.models.io.load import is_saved
from scfm.models.model import Model

OWN = "scfm"  # every model can be saved in the format of this family


@document
def load(
    path: str | Path,
    *,
    vocabulary: Source | None = None,
    medians: Source | None = None,
    strict: bool = True,
    device: str | torch.device = "auto",
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Model:
    """Load a model that `model.save` wrote, a model that is part of the package, or a published checkpoint.

    It reads scfm's own directories, Geneformer directories (V1 or V2; pretrained model, cell classifier or gene classifier),
    scGPT directories, scBERT files (.pth) and scFoundation files (.ckpt). No code in the files is executed: weights are
    safetensors or are read with torch's weights-only loader, and pickles are read with a reader that accepts plain
    dictionaries only. Tensors of a published checkpoint that the network does not use are listed with the reason in
    ``model.checkpoint.unused``.

    Parameters
    ----------
    path
        Directory or file; "blood", the model of blood cells that is part of the package; or "owner/name" of a repository on
        the Hugging Face Hub, whose model files are downloaded. A directory of the same name comes first.
    {checkpoint}
    device
        Device of the network: "cpu", "cuda", ... or "auto" for a CUDA device if there is one (under torchrun, that of
        LOCAL_RANK), otherwise the CPU.
    subfolder
        Folder or file of the model within `path`, such as "Geneformer-V2-104M". Vocabulary and medians are also searched in
        the other folders of a repository.
    revision, token
        Branch, tag or commit of the repository, and the token that gives access to a private one.

    Returns
    -------
    The model, on `device`.

    Raises
    ------
    ModelFileError
        If files are missing, damaged, unsafe, of a later format version or an unknown format, or if tensors are missing,
        unknown or of the wrong shape; the message lists them.
    ImportError
        If `path` is a repository and huggingface_hub is not installed (extra `hub`).

    Examples
    --------
    >>> import scfm
    >>> scfm.load("blood").labels[:3]
    ('B', 'plasma', 'CD4 T')
    >>> model = scfm.load("demo_output/model")  # doctest: +SKIP
    >>> model = scfm.load("ctheodoris/Geneformer", subfolder="Geneformer-V2-104M")  # doctest: +SKIP
    >>> model = scfm.load("Geneformer-V1-10M", vocabulary="tokens.pkl", medians="medians.pkl")  # doctest: +SKIP
    """
    found = _fetched(path, subfolder=subfolder, revision=revision, token=token)
    return _read(found, vocabulary=vocabulary, medians=medians, strict=strict)[0].to(resolved_device(device))


def recognize(path: str | Path) -> Family:
    """Return the family that a checkpoint belongs to.

    Parameters
    ----------
    path
        Directory or file.

    Raises
    ------
    ModelFileError
        If no family recognizes it.

    Examples
    --------
    >>> import scfm
    >>> scfm.families.recognize("my_model").name  # doctest: +SKIP
    'scfm'
    """
    return _opened(Path(path))[0]


def opened(model: Model | str | Path) -> Model:
    """Return a model unchanged, or load the path or name of one."""
    if isinstance(model, (str, Path)):
        return load(model)
    if not isinstance(model, Model):
        raise TypeError(
            f"`model` is a {type(model).__name__}; pass a model, which `scfm.fit` and `scfm.load` return, or its path."
        )
    return model


@document
def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    vocabulary: Source | None = None,
    medians: Source | None = None,
    strict: bool = True,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Model:
    """Read a model in one format and write it in another.

    Parameters
    ----------
    source
        Saved model or published checkpoint: a path, or "owner/name" of a repository on the Hugging Face Hub.
    target
        Directory or file to write. It must not exist, except that ``to="scfm"`` replaces a saved scfm model.
    to
        Format to write: the name of a family. None converts a published checkpoint to "scfm", and a saved scfm model to the
        format of the published family with the same encoding.
    {checkpoint}
    subfolder
        Folder or file of the model within `source`.
    revision, token
        Branch, tag or commit of the repository, and the token that gives access to a private one.

    Returns
    -------
    The model that was read.

    Raises
    ------
    ModelFileError
        If `source` cannot be read, `target` exists, or the model has an encoding or settings that the format does not support.
    ValueError
        If `to` is not the name of a family.

    Examples
    --------
    >>> import scfm
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> model.save("ours")
    >>> scfm.families.convert("ours", "theirs", to="geneformer").id == model.id
    True
    >>> scfm.load("theirs", vocabulary=model.encoding.vocabulary, medians=model.encoding.medians).network.config.n_layers
    3
    """
    target = Path(target)
    path = _fetched(source, subfolder=subfolder, revision=revision, token=token)
    model, family = _read(path, vocabulary=vocabulary, medians=medians, strict=strict)
    kind = model.encoding.config.kind
    fitting = [each.name for each in FAMILIES.values() if each.encoding.get("kind") == kind]
    if to is None:
        to = OWN if family.name != OWN or not fitting else fitting[0]
    if to not in FAMILIES:
        raise ValueError(f"`to` is {to!r}; choose one of {', '.join(FAMILIES)}.")
    if to != OWN and to not in fitting:
        raise ModelFileError(
            f"{path} has a {kind} encoding, which {to} does not read. Write it as {' or '.join([*fitting, OWN])}."
        )
    if to != OWN and target.exists():
        raise ModelFileError(f"{target} exists and is not overwritten. Choose another path, or remove it.")
    FAMILIES[to].write(model, target)
    return model


def _read(path: Path, *, vocabulary: Source | None, medians: Source | None, strict: bool) -> tuple[Model, Family]:
    """Read a model from local files, and the family that it belongs to."""
    family, files = _opened(path)
    model = family.read(files, vocabulary=vocabulary, medians=medians, strict=strict)
    if model.checkpoint is not None and model.objective is None:
        model.objective = family.presets[0].objective
    return model, family


def _opened(path: Path) -> tuple[Family, CheckpointFiles]:
    """Return the family of a checkpoint, and its files, some of which were read to recognize it."""
    if path.suffix in (".h5ad", ".zarr"):
        raise ModelFileError(f"{path} holds cells, not a model. Pass a directory that `model.save` wrote.")
    files = CheckpointFiles(path)
    if (family := _family_of(files)) is not None:
        return family, files
    if inside := [entry.name for entry in _entries(path) if _family_of(CheckpointFiles(entry)) is not None]:
        models = "a model" if len(inside) == 1 else "several models"
        raise ModelFileError(f"{path} is a folder with {models}. Select one with `subfolder=`: {', '.join(inside)}.")
    layouts = ", ".join(family.layout for family in FAMILIES.values())
    raise ModelFileError(f"{path} is not a model in a supported format. scfm reads: {layouts}.")


def _family_of(files: CheckpointFiles) -> Family | None:
    return next((family for family in FAMILIES.values() if family.recognize(files)), None)


def _entries(path: Path) -> list[Path]:
    """Return the folders within a folder, and its files that may be torch files."""
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if entry.is_dir() or entry.suffix in (".pt", ".pth", ".ckpt"))


def _fetched(path: str | Path, *, subfolder: str | None, revision: str | None, token: str | None) -> Path:
    """Return the local path of a model; from a repository, files of scfm's format are tried before those of the families."""
    fetch = partial(fetched, path, subfolder=subfolder, revision=revision, token=token)
    found = fetch()
    if Path(path).exists() or is_saved(found):
        return found
    patterns = [pattern for family in FAMILIES.values() for pattern in family.files]
    if (found / "model.safetensors").is_file():
        patterns.remove("pytorch_model.bin")  # the same weights
    return fetch(patterns=patterns, shared=[name for family in FAMILIES.values() for name in family.shared_files])
