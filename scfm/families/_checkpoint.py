"""The files of a checkpoint, opened once: what recognizes them and what reads them see the same content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scfm.models.io.load import read_json
from scfm.models.io.tensors import read_torch


class CheckpointFiles:
    """A file or a directory on disk, of which every JSON or torch file is read at most once.

    Parameters
    ----------
    path
        The file or directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[Path, Any] = {}

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the directory has a file of this name."""
        return (self.path / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file of the directory."""
        return self._once(self.path / name, read_json)

    def torch(self, name: str | None = None) -> Any:
        """Content of the `torch.save` file of this name, or of the file itself."""
        return self._once(self.path if name is None else self.path / name, read_torch)

    @property
    def content(self) -> dict[str, Any]:
        """Content of a single `torch.save` file; empty for a directory, and if the file does not hold a dictionary."""
        content = self.torch() if self.path.is_file() else None
        return content if isinstance(content, dict) else {}

    def _once(self, path: Path, read: Any) -> Any:
        if path not in self._content:
            self._content[path] = read(path)
        return self._content[path]
