"""Our own format: a directory of JSON and safetensors, written beside and renamed, checked when read."""

from __future__ import annotations

import json
import shutil
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from scfm._output import require_folder
from scfm.encoding import encoding_from_dict
from scfm.errors import ModelFileError
from scfm.models.config import ModelConfig
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.vocab import Vocabulary

FORMAT = "scfm"
FORMAT_VERSION = 1
CONFIG, VOCABULARY, WEIGHTS, ARRAYS = "config.json", "vocabulary.json", "weights.safetensors", "encoding.safetensors"


def save(model: Model, path: Path) -> None:
    """Write `model` as the directory `path`, replacing a model that is there; see `Model.save`."""
    require_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    try:
        _write(model, beside)
        if path.exists():
            old = beside.with_name(beside.name + ".old")
            path.rename(old)
            beside.rename(path)
            shutil.rmtree(old)
        else:
            beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_replaceable(path: Path) -> None:
    """Raise `ModelFileError` if a model cannot, or should not, be saved as `path`: ask before the training, not after."""
    if path.exists() and not is_own_directory(path):
        raise ModelFileError(
            f"{path} exists and is not a saved scfm model, so it is not overwritten. Choose another path, or remove it."
        )
    require_folder(path.parent)


def _write(model: Model, folder: Path) -> None:
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "scfm_version": version("single-cell-fm"),
        "model_id": model.id,
        "network": model.network.config.to_dict(),
        "encoding": model.encoding.to_dict(),
        "vocabulary": model.encoding.vocabulary.fingerprint,
        "labels": list(model.labels),
        "history": model.history,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False))
    model.encoding.vocabulary.to_json(folder / VOCABULARY)
    if arrays := model.encoding.arrays():
        save_arrays(arrays, folder / ARRAYS)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def is_own_directory(path: Path) -> bool:
    """Whether `path` holds a model in our own format, of any version."""
    config = path / CONFIG
    return config.is_file() and read_json(config).get("format") == FORMAT


def load_own(path: Path) -> Model:
    """Read a directory that `save` wrote.

    Raises
    ------
    ModelFileError
        If a file is missing, cut short, of a later format, or does not fit the others.
    """
    config = read_json(path / CONFIG)
    if config.get("format_version", 0) > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {config['format_version']}; this scfm reads up to {FORMAT_VERSION}. "
            "Upgrade: pip install -U single-cell-fm"
        )
    try:
        network_config = ModelConfig.from_dict(config["network"])
        vocabulary = Vocabulary.from_json(path / VOCABULARY)
        arrays = load_arrays(path / ARRAYS) if (path / ARRAYS).is_file() else {}
        encoding = encoding_from_dict(config["encoding"], vocabulary, arrays)
        labels, history = tuple(config["labels"]), dict(config["history"])
    except KeyError as error:
        raise ModelFileError(f"{path / CONFIG} has no entry {error}. It is damaged; save the model again.") from error
    except (TypeError, ValueError, SafetensorError, OSError) as error:
        what = str(error).rstrip(".")
        raise ModelFileError(f"{path} is damaged or incomplete: {what}. Save the model again.") from error
    if config.get("vocabulary", vocabulary.fingerprint) != vocabulary.fingerprint:
        raise ModelFileError(
            f"{path / VOCABULARY} is not the vocabulary that this model was saved with, so its genes would be mistaken for "
            "others. Put back the file of this model, or save the model again."
        )
    network = CellTransformer.for_vocabulary(network_config, vocabulary)
    load_weights(network, read_weights(path / WEIGHTS), str(path))
    return Model(network, encoding, labels=labels, history=history)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; a truncated one is an error that says so."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path} cannot be read as safetensors ({error}). The file is missing or cut short; copy or save it again."
        ) from error


def load_weights(network: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load every tensor into its place; one that is missing, unknown or of another shape is an error.

    Raises
    ------
    ModelFileError
        With the full list; the network is then untouched.
    """
    wanted = network.state_dict()
    faults = [f"missing: {name}" for name in wanted if name not in state]
    faults += [f"unknown: {name}" for name in state if name not in wanted]
    faults += [
        f"shape: {name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        raise ModelFileError(f"The weights of {source} do not fit the network they name:\n  " + "\n  ".join(faults))
    network.load_state_dict(state)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing. Give the directory that `model.save` wrote.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is not valid JSON ({error}). It is damaged; save the model again.") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}, not an object; it is no model configuration.")
    return content
