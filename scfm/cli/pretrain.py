"""`scfm pretrain`."""

from __future__ import annotations

import dataclasses
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from scfm import train
from scfm.cli import _files
from scfm.cli._command import command_of


def _settings(*, config: train.PretrainConfig | None = None, fit: train.FitConfig | None = None) -> None:
    """Hold the signature that the options are made from."""


def _read_config(path: Path) -> train.PretrainConfig:
    try:
        return train.PretrainConfig.from_dict(loads(path.read_text()))
    except OSError as error:
        raise OSError(f"`--config-file` {path} cannot be read: {error.strerror}.") from error
    except JSONDecodeError as error:
        raise ValueError(f"`--config-file` {path} is not valid JSON: {error}.") from error


@command_of(_settings)
def pretrain(
    *paths: Path, config_file: Path | None = None, progress: bool = True, json: bool = False, **options: Any
) -> None:
    """Train on files larger than memory; started again with the same output, it goes on where it was.

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
        config = options.get("config") or train.PretrainConfig()
        config = dataclasses.replace(config, fit=options.get("fit") or config.fit)
    model = train.pretrain(sources, target, config, progress=progress)
    facts = {"output": target, "model": target / "model", "model_id": model.id, "n_parameters": model.n_parameters}
    _files.tell(facts, as_json=json, text=f"{model!r}\nsaved as {target / 'model'}")
