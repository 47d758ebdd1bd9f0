"""What Lightning does differently here: checkpoint files, and weights in bfloat16."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import HalfPrecision

from scfm._files import atomic_write
from scfm.train.checkpoints import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files of Lightning, written atomically, so that a file is either complete or does not exist."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as temporary_path, temporary_path.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class Bfloat16(HalfPrecision):
    """Weights and arithmetic in bfloat16, without Lightning's conversion of batches, which fails for frozen dataclasses."""

    def __init__(self) -> None:
        super().__init__("bf16-true")

    def convert_input(self, data: Any) -> Any:
        return data
