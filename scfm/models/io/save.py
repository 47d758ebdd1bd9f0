"""Writing scfm's own format: a directory of JSON and safetensors, written under another name and renamed."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from scfm._files import require_folder
from scfm.errors import ModelFileError
from scfm.models.io.layout import ARRAYS, CONFIG, FORMAT, FORMAT_VERSION, SCREEN, VOCABULARY, WEIGHTS
from scfm.models.io.load import is_saved
from scfm.models.state import ModelState


def save(model: ModelState, path: Path) -> None:
    """Write `model` as the directory `path`, replacing a model that is there; see `Model.save`."""
    require_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary_path.mkdir()
    try:
        _write(model, temporary_path)
        if path.exists():
            old = temporary_path.with_name(temporary_path.name + ".old")
            path.rename(old)
            temporary_path.rename(path)
            shutil.rmtree(old)
        else:
            temporary_path.rename(path)
    finally:
        shutil.rmtree(temporary_path, ignore_errors=True)


def require_replaceable(path: Path) -> None:
    """Raise `ModelFileError` if a model cannot, or should not, be saved as `path`: ask before the training, not after."""
    if path.exists() and not is_saved(path):
        raise ModelFileError(
            f"{path} exists and is not a saved scfm model, so it is not overwritten. Choose another path, or remove it."
        )
    require_folder(path.parent)


def _write(model: ModelState, folder: Path) -> None:
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "scfm_version": version("single-cell-fm"),
        "model_id": model.id,
        "network": model.network.config.to_dict(),
        "encoding": model.encoding.to_dict(),
        "vocabulary": model.encoding.vocabulary.fingerprint,
        "labels": list(model.labels),
        "calibration": None if model.calibration is None else asdict(model.calibration),
        "checkpoint": None if model.checkpoint is None else asdict(model.checkpoint),
        "objective": model.objective,
        "scores": model.scores,
        "history": model.history,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False))
    model.encoding.vocabulary.to_json(folder / VOCABULARY)
    if arrays := model.encoding.arrays():
        save_arrays(arrays, folder / ARRAYS)
    for tensors, name in ((model.network.state_dict(), WEIGHTS), (model.screen, SCREEN)):
        if tensors:
            state = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(state, folder / name, metadata={"format": "pt"})
