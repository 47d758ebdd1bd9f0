"""`scfm pretrain`."""

from __future__ import annotations

from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command


def _settings(*, config: scfm.train.PretrainConfig | None = None) -> None:
    """Hold the signature that the options are made from."""


def _read_config(path: Path) -> scfm.train.PretrainConfig:
    try:
        return scfm.train.PretrainConfig.from_dict(loads(path.read_text()))
    except OSError as error:
        raise OSError(f"`--config-file` {path} cannot be read: {error.strerror}.") from error
    except JSONDecodeError as error:
        raise ValueError(f"`--config-file` {path} is not valid JSON: {error}.") from error


@command(
    example="scfm pretrain donor1.h5ad donor2.h5ad run --preset small --n-steps 10000",
    options_of="scfm.cli.pretrain._settings",
)
def pretrain(
    *paths: Path, config_file: Path | None = None, progress: bool = True, json: bool = False, **options: Any
) -> None:
    """Train on files larger than memory; a run that was stopped resumes.

    Parameters
    ----------
    paths
        One or many .h5ad or .zarr inputs with raw counts, and last the folder of the run.
    config_file
        JSON with all settings, as a run writes it (config.json), in place of options.
    progress
        Whether to show a progress bar.
    json
        Print the result as one JSON object instead of words.
    """
    *sources, target = _files.inputs_and_output(paths)
    if config_file is not None and options:
        raise ValueError(
            "`--config-file` holds all settings; leave the other options out, or write them into the file."
        )
    if config_file is not None:
        config = _read_config(config_file)
    else:
        config = options.get("config") or scfm.train.PretrainConfig()
    model = scfm.train.pretrain(sources, target, config, progress=progress)
    facts = {"output": target, "model": target / "model", "model_id": model.id, "n_parameters": model.n_parameters}
    _files.tell(facts, as_json=json, text=f"{model!r}\nsaved as {target / 'model'}")
