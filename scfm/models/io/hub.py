"""Models on a model hub: our one format, a model card beside it, and nothing that could run."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from scfm.errors import ModelFileError
from scfm.models.io.card import model_card
from scfm.models.io.save import save
from scfm.models.state import ModelState

CARD = "README.md"
PATTERNS = ["*.json", "*.safetensors", "*.tsv", CARD]  # what is fetched; pickles are not
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def save_pretrained(model: ModelState, folder: Path, *, name: str, data: str | None, licence: str | None) -> None:
    """Write `folder` as `model.save` does, with a model card; see `Model.save_pretrained`."""
    save(model, folder)
    (folder / CARD).write_text(model_card(model, name=name, data=data, licence=licence))


def fetched(path: str | Path, *, revision: str | None, token: str | None) -> Path:
    """Return the directory `path`, or that of the repository of this name on the hub, once its files are here."""
    return Path(path) if Path(path).exists() else fetch(str(path), revision=revision, token=token)


def fetch(repository: str, *, revision: str | None, token: str | None) -> Path:
    """Bring the files of a model from the hub; those that are here already are not fetched again."""
    if not REPOSITORY.fullmatch(repository):
        raise ModelFileError(f"There is no {repository}. Give a directory, or a repository on the hub as 'owner/name'.")
    hub = _client()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, token=token, allow_patterns=PATTERNS))
    except (OSError, ValueError) as error:  # what every error of the client is
        reason = str(error).strip().partition("\n")[0]
        raise ModelFileError(
            f"{repository} is no directory here, and could not be fetched from the hub: {reason} "
            "Check the name and the network, or give a directory that `model.save` wrote."
        ) from error


def push(
    model: ModelState,
    repository: str,
    *,
    data: str | None,
    licence: str | None,
    private: bool,
    revision: str | None,
    token: str | None,
) -> str:
    """Upload the model with its card, in one commit; see `Model.push_to_hub`."""
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"`repository` is {repository!r}; write it as 'owner/name'.")
    hub = _client().HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_pretrained(model, folder, name=repository, data=data, licence=licence)
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=f"scfm model {model.id}"
        )
    return str(done.commit_url)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError('The model hub needs huggingface_hub: pip install "single-cell-fm[hub]".') from error
    return huggingface_hub
