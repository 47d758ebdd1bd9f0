"""Checkpoints: written atomically, checked when read, and resumed with any number of processes."""

from __future__ import annotations

import logging
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scfm.errors import ModelFileError
from scfm.models.io.tensors import read_torch
from scfm.train.config import FitConfig
from scfm.train.ranks import rank_and_world_size

logger = logging.getLogger(__name__)

SUFFIX = ".ckpt"
META = "meta.pt"  # Lightning's name of the file, in a folder of shards, for all but weights and optimizer state
SHARDS = ".metadata"  # torch's name of the list of all shards, a pickle that torch reads without restrictions
# What that list is made of, by module.
_OF_SHARDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU with torch's weights-only loader, of shards all but the shards; no code in it is executed.

    Raises
    ------
    ModelFileError
        If the file is cut short, or is not a checkpoint of scfm.
    """
    try:
        if path.is_dir():
            require_shards_only(path)
        content = read_torch(path / META if path.is_dir() else path)
    except (ModelFileError, OSError) as error:
        raise ModelFileError(f"{path} is cut short or damaged, or scfm did not write it.") from error
    if not isinstance(content, dict) or "global_step" not in content:
        raise ModelFileError(f"{path} is not a checkpoint of a training run.")
    return content


class _ShardsReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _OF_SHARDS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def require_shards_only(path: Path) -> None:
    """Raise `ModelFileError` if the list of shards of a checkpoint is damaged, or asks for more than descriptions of tensors.

    torch reads this list as a pickle that may run any code, so it must be checked before.
    """
    try:
        with (path / SHARDS).open("rb") as file:
            _ShardsReader(file).load()
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise ModelFileError(f"{path / SHARDS} is not a list of shards: {error}.") from error


@dataclass(frozen=True)
class Resumption:
    """The checkpoint from which a run is resumed.

    Attributes
    ----------
    path
        The checkpoint.
    step
        Number of completed optimizer steps.
    n_lanes
        Number of batches of a step, over all processes.
    """

    path: Path
    step: int
    n_lanes: int

    @classmethod
    def newest(cls, run_dir: str | Path | None) -> Resumption | None:
        """Return the newest readable checkpoint of a run; damaged ones are skipped with a warning."""
        if run_dir is None:
            return None
        for path in checkpoints_of(Path(run_dir) / "checkpoints"):
            try:
                content = read_checkpoint(path)
            except ModelFileError as error:
                logger.warning("%s It is ignored; an older checkpoint is used, or the run starts again.", error)
                continue
            return cls(path, int(content["global_step"]), int(content.get("n_lanes", 1)))
        return None

    def divided(self, config: FitConfig) -> FitConfig:
        """Return `config` with the batches of a step divided among the present processes.

        Raises
        ------
        ValueError
            If they cannot be divided.
        """
        _, world_size = rank_and_world_size(config)
        if self.n_lanes % world_size:
            allowed = [str(n) for n in range(1, self.n_lanes + 1) if self.n_lanes % n == 0]
            raise ValueError(
                f"The run has {self.n_lanes} batches in each step, which cannot be divided among {world_size} processes. "
                f"Resume it with {' or '.join(allowed)}."
            )
        return config.replace(accumulate=self.n_lanes // world_size)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return all checkpoints in a folder, newest first."""
    return sorted(folder.glob(f"step=*{SUFFIX}"), key=_step_of, reverse=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a file, or a directory of shards."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step=").split("-")[0]
    return int(digits) if digits.isdigit() else -1
