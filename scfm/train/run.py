"""The output folder of a pretraining run: its lock, its recorded settings, and its statistics of the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scfm._files import atomic_write, output_lock, require_folder
from scfm.data.ranks import gather, gather_to_first, torchrun_rank
from scfm.errors import ModelFileError, ScfmError
from scfm.train.config import FitConfig
from scfm.train.ranks import rank_and_world_size
from scfm.train.statistics import Learning, Statistics

# Settings that do not affect what a run computes; they may change when it is resumed.
RESUMABLE = frozenset(
    {
        "n_steps", "accumulate", "precision", "accelerator", "devices", "n_nodes", "strategy", "compile",
        "activation_checkpointing", "validate_every", "patience", "checkpoint_every", "checkpoint_minutes",
    }
)  # fmt: skip


class Run:
    """The output folder of a run; every process of the run has such an object.

    Attributes
    ----------
    folder
        The folder.
    is_first
        Whether this process is the first, which writes the files.
    """

    def __init__(self, folder: Path, *, is_first: bool) -> None:
        self.folder, self.is_first = folder, is_first

    @classmethod
    @contextmanager
    def open(cls, folder: Path, config: FitConfig) -> Iterator[Run]:
        """Lock the folder, so that no other run can be started in it meanwhile."""
        require_folder(folder.parent)
        require_folder(folder)
        is_first = rank_and_world_size(config)[0] == 0
        with output_lock(folder) if is_first else nullcontext():
            yield cls(folder, is_first=is_first)

    def stored(self) -> dict[str, Any] | None:
        """Return the content of `config.json`; None for a new run."""
        path = self.folder / "config.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict) or "pretrain" not in content:
                raise ValueError("no key 'pretrain'")
        except (ValueError, UnicodeDecodeError) as error:
            raise ModelFileError(
                f"{path} is not the record of a run ({error}). Restore it, or choose another output folder."
            ) from error
        return content

    def resume_or_start(self, settings: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        """Raise if the folder holds another run, otherwise record the settings."""
        stored = self.stored()
        wanted = {
            "pretrain": settings,
            "data": fingerprint,
            "scfm_version": version("single-cell-fm"),
        }
        if stored is not None:
            changes = _differences(stored["pretrain"], settings)
            if stored["data"]["sha256"] != fingerprint["sha256"]:
                changes.append("data: " + _changed_files(stored["data"], fingerprint))
            if changes:
                raise ValueError(
                    f"{self.folder} holds a run with other settings or data ({'; '.join(changes)}). Choose another output "
                    "folder, or pass the same settings and data to resume that run."
                )
        if self.is_first:
            with atomic_write(self.folder / "config.json") as temporary_path:
                temporary_path.write_text(json.dumps(wanted, indent=1))

    def statistics(self, key_of: Mapping[str, Any], learning: Learning) -> Statistics:
        """Return statistics of the data: those of an earlier start, or new ones, for which each process reads some files."""
        key = hashlib.sha256(json.dumps(key_of, sort_keys=True).encode()).hexdigest()
        folder = self.folder / "statistics"

        found = Statistics.load(folder, key)
        if not all(gather(found is not None)):
            rank, world_size = torchrun_rank()
            parts = gather_to_first(lambda: learning.survey(rank, world_size))
            self.by_first_process(lambda: learning.finish(parts or []).save(folder, key))
            found = Statistics.load(folder, key)
        if found is None:
            raise ModelFileError(
                f"{folder} cannot be read by this process. All processes of a run must share the output folder."
            )
        return found

    def by_first_process(self, make: Callable[[], None]) -> None:
        """Call `make` in the first process while the others wait; if it fails, all processes raise."""
        if self.is_first:
            try:
                make()
            except BaseException as error:
                gather(f"{type(error).__name__}: {error}")
                raise
        failure = gather(None)[0]
        if failure is not None:
            raise ScfmError(f"The first process of the run failed: {failure}")


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the settings that must not differ but do, with both values."""
    wanted = json.loads(json.dumps(wanted))
    old, new = _flat(stored), _flat(wanted)
    names = [name for name in {**old, **new} if name.removeprefix("config.") not in RESUMABLE]
    return [f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _changed_files(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    old, new = ({entry["file"]: entry for entry in each["files"]} for each in (stored, wanted))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(changed) or "the order of the files"
