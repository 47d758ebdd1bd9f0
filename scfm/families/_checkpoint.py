"""The files of a checkpoint, each of which is read once, for recognition and for loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scfm.models.io.load import read_json
from scfm.models.io.tensors import read_torch


class CheckpointFiles:
    """A file or directory on disk, whose JSON and torch files are read at most once each.

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
        """Return the content of a JSON file of the directory."""
        return self._once(self.path / name, read_json)

    def torch(self, name: str | None = None) -> Any:
        """Return the content of the `torch.save` file of this name, or of the checkpoint if it is a file."""
        return self._once(self.path if name is None else self.path / name, read_torch)

    @property
    def content(self) -> dict[str, Any]:
        """Content of a checkpoint that is one `torch.save` file; empty for a directory or other content than a dictionary."""
        content = self.torch() if self.path.is_file() else None
        return content if isinstance(content, dict) else {}

    def _once(self, path: Path, read: Any) -> Any:
        if path not in self._content:
            self._content[path] = read(path)
        return self._content[path]
