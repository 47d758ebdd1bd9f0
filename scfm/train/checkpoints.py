"""Checkpoints that survive: written beside and renamed, and refused when cut short."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from scfm.errors import ModelFileError

logger = logging.getLogger(__name__)

SUFFIX = ".ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, never half-written: what is there under a name is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except OSError as error:
            raise ModelFileError(
                f"The checkpoint {target} could not be written ({error.strerror or error}). Earlier checkpoints are "
                "untouched: free some space, and run the same command again to go on from the last one."
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with weights-only loading; nothing in it is executed.

    Raises
    ------
    ModelFileError
        If the file is cut short or is none of ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and others for damaged files
        raise ModelFileError(f"{path} is cut short or damaged ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict) or "global_step" not in content:
        raise ModelFileError(f"{path} is not a checkpoint of a training run.")
    return content


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest readable checkpoint of a run and its step; a damaged one is passed over with a warning."""
    for path in sorted(folder.glob(f"step=*{SUFFIX}"), key=_step_of, reverse=True):
        try:
            return path, int(read_checkpoint(path)["global_step"])
        except ModelFileError as error:
            logger.warning("%s Going back to the checkpoint before it.", error)
    return None


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step=").split("-")[0]
    return int(digits) if digits.isdigit() else -1
