"""Read saved models of all format versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from scfm._untrusted import require_downloaded
from scfm.encoding import encoding_from_dict
from scfm.errors import ModelFileError
from scfm.models.config import ModelConfig
from scfm.models.io import format_1
from scfm.models.io.earlier_tensors import current_shapes, current_tensors
from scfm.models.io.layout import ARRAYS, CONFIG, FORMAT, FORMAT_VERSION, VOCABULARY, WEIGHTS
from scfm.models.network import CellTransformer
from scfm.models.shapes import shapes_only
from scfm.models.state import Calibration, Checkpoint, ModelState
from scfm.vocab import Vocabulary

MAX_FAULTS = 40  # number of tensors that an error lists


def is_saved(path: Path) -> bool:
    """Whether `path` is a saved model of any format version."""
    config = path / CONFIG
    return config.is_file() and read_json(config).get("format") == FORMAT


def load_saved(path: Path) -> ModelState:
    """Read a directory that `save` wrote.

    Raises
    ------
    ModelFileError
        If a file is missing, cut short, of a later format version, or of another model, or if weights are not finite.
    """
    config = read_json(path / CONFIG)
    _require_known_version(config, path)
    _require_files(config, path)
    try:
        model = _state_of(config, path)
    except ModelFileError:
        raise
    except KeyError as error:
        raise ModelFileError(f"{path / CONFIG} has no entry {error}. It is damaged; save the model again.") from error
    except PermissionError as error:
        raise ModelFileError(f"{error.filename or path} cannot be read: permission denied.") from error
    except (TypeError, ValueError, AttributeError, SafetensorError, OSError) as error:
        what = str(error).rstrip(".")
        raise ModelFileError(f"{path} is damaged or incomplete: {what}. Save the model again.") from error
    # The id covers fields that older formats do not have, so that of an older file cannot be computed again.
    is_current = config["format_version"] == FORMAT_VERSION
    if "files" in config and (config.get("model_id") != model.id if is_current else _weights_changed(config, path)):
        changed = _weights_changed(config, path)
        raise ModelFileError(
            f"{path / (WEIGHTS if changed else CONFIG)} is not the file that this model was saved with: the id of the model is "
            f"{model.id}, not {config.get('model_id')!r}. Restore the files of one model, or save the model again."
        )
    return model


def _require_known_version(config: Mapping[str, Any], path: Path) -> None:
    version = config.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ModelFileError(f"{path / CONFIG} has format version {version!r}. It is damaged; save the model again.")
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {version}; this scfm reads up to {FORMAT_VERSION}. "
            "Install a newer version of scfm."
        )


def _weights_changed(config: Mapping[str, Any], path: Path) -> bool:
    return digest(path / WEIGHTS) != config["files"].get(WEIGHTS)


def _require_files(config: Mapping[str, Any], path: Path) -> None:
    """Compare files with their digests in `config.json`, except the weights, which the id of the model covers."""
    digests = config.get("files", {} if config["format_version"] == 1 else None)
    if not isinstance(digests, dict) or (config["format_version"] > 1 and not {WEIGHTS, VOCABULARY} <= set(digests)):
        raise ModelFileError(
            f"{path / CONFIG} does not list the files of the model. It is damaged; save the model again."
        )
    for name in (VOCABULARY, ARRAYS):
        file, expected = path / name, digests.get(name)
        if expected is not None and not file.is_file():
            raise ModelFileError(f"{file} is missing. Restore the file, or save the model again.")
        if file.is_file() and config["format_version"] > 1 and digest(file) != expected:
            raise ModelFileError(
                f"{file} is not the file that this model was saved with. Restore the file, or save the model again."
            )


def _state_of(config: Mapping[str, Any], path: Path) -> ModelState:
    if config["format_version"] == 1:
        config = format_1.content(config)
    if config["format_version"] < 3 and config["calibration"]:
        config = {**config, "calibration": {**config["calibration"]}}
        config["calibration"].pop("typical_distance", None)  # replaced by a novelty score
    network_config = ModelConfig.from_dict(config["network"])
    vocabulary = Vocabulary.from_json(path / VOCABULARY)
    if config.get("vocabulary", vocabulary.fingerprint) != vocabulary.fingerprint:  # format 1
        raise ModelFileError(
            f"{path / VOCABULARY} is not the vocabulary that this model was saved with, so genes would be confused. "
            "Restore the file, or save the model again."
        )
    arrays = load_arrays(path / ARRAYS) if (path / ARRAYS).is_file() else {}
    labels, n_classes = tuple(config["labels"]), network_config.classes.n_classes
    if labels and len(labels) != n_classes:
        raise ModelFileError(
            f"{path / CONFIG} has {len(labels)} labels for {n_classes} classes. It is damaged; save the model again."
        )
    return ModelState(
        read_network(network_config, vocabulary, path / WEIGHTS),
        encoding_from_dict(config["encoding"], vocabulary, arrays),
        labels=labels,
        calibration=None if config["calibration"] is None else Calibration.from_dict(config["calibration"]),
        checkpoint=None if config["checkpoint"] is None else Checkpoint.from_dict(config["checkpoint"]),
        scores=config["scores"],
        objective=config.get("objective"),
        history=dict(config["history"]),
    )


def read_network(config: ModelConfig, vocabulary: Vocabulary, path: Path) -> CellTransformer:
    """Build a network from a file of weights; shapes are compared before memory is allocated."""
    shapes = current_shapes(shapes_in(path), config.classes.n_classes)
    n_blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if n_blocks != config.n_layers:
        raise ModelFileError(
            f"{path} has {n_blocks} blocks, but the network has {config.n_layers} according to its settings. Restore the files "
            "of one model."
        )
    with shapes_only():
        expected = CellTransformer.for_vocabulary(config, vocabulary).state_dict()
    require_fitting(expected, shapes, str(path.parent))
    weights = current_tensors(read_weights(path), config.classes.n_classes)
    require_finite(weights, str(path))
    network = CellTransformer.for_vocabulary(config, vocabulary)
    network.load_state_dict(weights)
    return network


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file, read from its header."""
    require_downloaded(path)
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # the file itself is not iterable
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ModelFileError(
            f"{path} is cut short or damaged ({error}). Copy it again, or save the model again."
        ) from error


def require_fitting(expected: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise `ModelFileError` that lists all tensors that are missing, unknown or of the wrong shape."""
    faults = [f"missing: {name}" for name in expected if name not in found]
    faults += [f"unknown: {name}" for name in found if name not in expected]
    faults += [
        f"shape: {name} is {found[name]}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    if faults:
        listing = "\n  ".join(
            [*faults[:MAX_FAULTS], *([f"and {len(faults) - MAX_FAULTS} more"] * (len(faults) > MAX_FAULTS))]
        )
        raise ModelFileError(f"The weights of {source} do not match the network of its settings:\n  {listing}")


def require_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise `ModelFileError` if a tensor holds NaN or infinite values."""
    broken = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if broken:
        raise ModelFileError(
            f"{source} holds values that are not finite, in {len(broken)} of {len(tensors)} tensors (first: {broken[0]}). "
            "The file is damaged, or training diverged."
        )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; raise `ModelFileError` if it is truncated."""
    if path.is_file():
        require_downloaded(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path} cannot be read as safetensors ({error}). It is missing or cut short; copy or save it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    if path.is_file():
        require_downloaded(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing. Pass the directory that `model.save` wrote.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON ({error}). It is damaged; save the model again.") from error
    if not isinstance(content, dict):
        raise ModelFileError(
            f"{path} holds a {type(content).__name__}, not an object, so it is not a model configuration."
        )
    return content
