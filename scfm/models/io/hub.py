"""Download models from the Hugging Face Hub, and upload models in scfm's format with a model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm.errors import ModelFileError
from scfm.models.io.card import model_card
from scfm.models.io.layout import shipped
from scfm.models.io.save import save
from scfm.models.state import ModelState

CARD = "README.md"
PATTERNS = ("*.json", "*.safetensors", "*.tsv", CARD)  # files of scfm's format; pickles are not downloaded
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def save_pretrained(model: ModelState, folder: Path, *, name: str, data: str | None, license: str | None) -> None:
    """Write `folder` as `model.save` does, with a model card; see `Model.save_pretrained`."""
    save(model, folder)
    (folder / CARD).write_text(model_card(model, name=name, data=data, license=license))


def fetched(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    patterns: Sequence[str] = PATTERNS,
    shared: Sequence[str] = (),
) -> Path:
    """Return a local file or directory, that of a model in the package, or that to which a hub repository is downloaded.

    Parameters
    ----------
    path
        Local path, name of a model that is part of the package, or "owner/name".
    revision, token
        Branch, tag or commit of the repository, and the token that gives access to a private one.
    subfolder
        Folder or file within `path`.
    patterns
        Patterns of the files to download from the repository, or from the subfolder.
    shared
        Patterns of files to download from other folders of the repository.

    Raises
    ------
    ModelFileError
        If neither such a path nor such a repository exists.
    ImportError
        If `path` is a repository and huggingface_hub is not installed (extra `hub`).
    """
    local = Path(path) if subfolder is None else Path(path) / subfolder
    if local.exists():
        return local
    name = str(path)
    if subfolder is None and name in shipped():
        return shipped()[name]
    if Path(path).exists():
        raise ModelFileError(f"{path} has no {subfolder}; it contains {_content_of(Path(path))}.")
    if not REPOSITORY.fullmatch(name) or Path(path).parent.exists():
        raise ModelFileError(
            f"There is no {path}. Pass a directory that `model.save` wrote, a published checkpoint, a repository on the hub "
            f"as 'owner/name', or the name of a model in the package ({', '.join(shipped())})."
        )
    folder = "" if subfolder is None else f"{subfolder.strip('/')}/"
    wanted = [*(folder + pattern for pattern in patterns), *shared]
    deeper = [f"{folder}*/{pattern}" for pattern in patterns]  # the star also matches slashes
    root = _snapshot(name, revision, token, allow_patterns=wanted, ignore_patterns=deeper)
    found = root if subfolder is None else root / subfolder
    if not found.exists():
        raise ModelFileError(f"The repository {name} has no {subfolder}. Look up the folders on its page.")
    return found


def _snapshot(repository: str, revision: str | None, token: str | None, **patterns: Any) -> Path:
    hub = _client()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, token=token, **patterns))
    except (OSError, ValueError) as error:  # base classes of all errors of the client
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelFileError(
            f"There is no local {repository}, and it could not be downloaded from the hub: {reason}. "
            "Check the name and the network, or pass a directory that `model.save` wrote."
        ) from error


def _content_of(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return ", ".join(names[:20]) or "nothing"


def push(
    model: ModelState,
    repository: str,
    *,
    data: str | None,
    license: str | None,
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
        save_pretrained(model, folder, name=repository, data=data, license=license)
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=f"scfm model {model.id}"
        )
    return str(done.commit_url)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("The model hub needs huggingface_hub: `pip install huggingface_hub`.") from error
    return huggingface_hub
