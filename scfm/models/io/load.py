"""Reading scfm's own format: a directory of JSON and safetensors, of any past version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from scfm.encoding import encoding_from_dict
from scfm.errors import ModelFileError
from scfm.models.config import ModelConfig
from scfm.models.io import format_1
from scfm.models.io.layout import ARRAYS, CONFIG, FORMAT, FORMAT_VERSION, SCREEN, VOCABULARY, WEIGHTS
from scfm.models.network import CellTransformer
from scfm.models.state import Calibration, Checkpoint, ModelState
from scfm.vocab import Vocabulary


def is_saved(path: Path) -> bool:
    """Whether `path` holds a model in scfm's own format, of any version."""
    config = path / CONFIG
    return config.is_file() and read_json(config).get("format") == FORMAT


def load_saved(path: Path) -> ModelState:
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
    screen = read_weights(path / SCREEN) if (path / SCREEN).is_file() else {}
    try:
        if config.get("format_version") == 1:
            screen = format_1.screen_directions(config["history"])
            config = format_1.content(config)
        network_config = ModelConfig.from_dict(config["network"])
        vocabulary = Vocabulary.from_json(path / VOCABULARY)
        arrays = load_arrays(path / ARRAYS) if (path / ARRAYS).is_file() else {}
        encoding = encoding_from_dict(config["encoding"], vocabulary, arrays)
        calibration = None if config["calibration"] is None else Calibration(**config["calibration"])
        checkpoint = None if config["checkpoint"] is None else Checkpoint(**config["checkpoint"])
        labels, scores, history = tuple(config["labels"]), config["scores"], dict(config["history"])
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
    weights = {
        format_1.RENAMED_TENSORS.get(name, name): tensor for name, tensor in read_weights(path / WEIGHTS).items()
    }
    load_weights(network, weights, str(path))
    return ModelState(
        network,
        encoding,
        labels=labels,
        calibration=calibration,
        scores=scores,
        screen=screen,
        objective=config.get("objective"),
        checkpoint=checkpoint,
        history=history,
    )


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
