"""Save models: a directory of JSON and safetensors, written under a temporary name and renamed."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from scfm._files import atomic_write, require_folder
from scfm.errors import ModelFileError
from scfm.models.io.layout import ARRAYS, CONFIG, FORMAT, FORMAT_VERSION, VOCABULARY, WEIGHTS
from scfm.models.io.load import digest, is_saved, require_finite
from scfm.models.state import ModelState, Precision, require_precision


def save(model: ModelState, path: Path, *, precision: Precision = "fp32") -> None:
    """Write `model` as the directory `path`, replacing an existing model; see `Model.save`."""
    require_precision(precision)
    require_replaceable(path)
    require_finite(model.network.state_dict(), "The model to save")
    model = model if precision == "fp32" else _rounded(model)
    with atomic_write(path) as temporary_path:
        temporary_path.mkdir()
        write_files(model, temporary_path, precision=precision)


def require_replaceable(path: Path) -> None:
    """Raise `ModelFileError` if a model cannot be saved as `path`; call it before the training."""
    require_folder(path.parent)
    if path.exists() and not is_saved(path):
        raise ModelFileError(
            f"{path} exists and is not a saved scfm model, so it is not overwritten. Choose another path, or remove it."
        )


def write_files(model: ModelState, folder: Path, *, precision: Precision = "fp32") -> None:
    """Write the files of a model to an empty folder; `config.json`, which has their digests, is written last.

    With "bf16", matrices are written in bfloat16; their values must have been rounded to it before.
    """
    model.encoding.vocabulary.to_json(folder / VOCABULARY)
    if arrays := model.encoding.arrays():
        save_arrays(arrays, folder / ARRAYS)
    tensors = _on_host(model.network.state_dict())
    if precision == "bf16":
        tensors |= _matrices_in_bfloat16(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):  # safetensors makes files readable by their owner only
        file.chmod((folder / VOCABULARY).stat().st_mode)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "scfm_version": version("single-cell-fm"),
        "model_id": model.id,
        "files": {file.name: digest(file) for file in sorted(folder.iterdir())},
        "network": model.network.config.to_dict(),
        "encoding": model.encoding.to_dict(),
        "labels": list(model.labels),
        "calibration": None if model.calibration is None else model.calibration.to_dict(),
        "checkpoint": None if model.checkpoint is None else model.checkpoint.to_dict(),
        "objective": model.objective,
        "scores": model.scores,
        "history": model.history,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False))


def _rounded(model: ModelState) -> ModelState:
    """Copy a model and round the values of its matrices to bfloat16."""
    network = copy.deepcopy(model.network)
    state = network.state_dict()
    rounded = {name: tensor.to(state[name].dtype) for name, tensor in _matrices_in_bfloat16(state).items()}
    network.load_state_dict(state | rounded)
    return dataclasses.replace(model, network=network)


def _matrices_in_bfloat16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() > 1
    }


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
