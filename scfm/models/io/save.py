"""Save models: a directory of JSON and safetensors, written under a temporary name and renamed."""

from __future__ import annotations

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
from scfm.models.state import ModelState


def save(model: ModelState, path: Path) -> None:
    """Write `model` as the directory `path`, replacing an existing model; see `Model.save`."""
    require_replaceable(path)
    require_finite(model.network.state_dict(), "The model to save")
    with atomic_write(path) as temporary_path:
        temporary_path.mkdir()
        write_files(model, temporary_path)


def require_replaceable(path: Path) -> None:
    """Raise `ModelFileError` if a model cannot be saved as `path`; call it before the training."""
    require_folder(path.parent)
    if path.exists() and not is_saved(path):
        raise ModelFileError(
            f"{path} exists and is not a saved scfm model, so it is not overwritten. Choose another path, or remove it."
        )


def write_files(model: ModelState, folder: Path) -> None:
    """Write the files of a model to an empty folder; `config.json`, which has their digests, is written last."""
    model.encoding.vocabulary.to_json(folder / VOCABULARY)
    if arrays := model.encoding.arrays():
        save_arrays(arrays, folder / ARRAYS)
    save_file(_on_host(model.network.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
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


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
