"""`scfm fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command


@command(
    example="scfm fit pbmc.h5ad pbmc_model --labels-key cell_type",
    options_of="scfm.fit",
    leave_out={"key_added", "pretrain_config"},
)
def fit(
    *paths: str,
    pretrain_steps: int | None = None,
    pretrain_learning_rate: float | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Train a model on raw counts and save it; with labels, compare it with simple baselines.

    Parameters
    ----------
    paths
        One or many inputs with raw counts (.h5ad, .zarr, URLs, or a .txt file that lists them), and last the directory to save
        the model in; an existing model is replaced.
    pretrain_steps
        Optimizer steps of pretraining, with --labels-key. By default, chosen by the number of cells. With --labels-key, the
        training options below are those of fine-tuning.
    pretrain_learning_rate
        Peak learning rate of pretraining, with --labels-key. By default, 1e-3.
    json
        Print the result as one JSON object instead of words.
    """
    from scfm.models.io.save import require_replaceable

    sources, output = _files.inputs_and_output(paths)
    require_replaceable(output)
    options |= _pretraining(options, n_steps=pretrain_steps, learning_rate=pretrain_learning_rate)
    model = scfm.fit(sources, **options)
    model.save(output)
    report = model.report() if model.scores is not None else None
    facts: dict[str, Any] = {"model": output, "model_id": model.id, "n_parameters": model.n_parameters}
    text = f"{model!r}\nsaved as {output}"
    if report is not None:
        facts["report"] = _files.records(report)
        text = f"{report.round(3).to_string()}\n{text}"
    _files.tell(facts, as_json=json, text=text)


def _pretraining(options: Mapping[str, Any], **given: float | None) -> dict[str, Any]:
    """The configuration of pretraining, if one of its settings was given."""
    settings = {name: value for name, value in given.items() if value is not None}
    if not settings:
        return {}
    if options.get("labels_key") is None:
        raise ValueError(
            "--pretrain-steps and --pretrain-learning-rate are for a model with labels, whose second stage is "
            "fine-tuning. Use --n-steps and --learning-rate, or pass --labels-key."
        )
    tuning = options.get("config") or scfm.FitConfig()
    return {"pretrain_config": tuning.machine_only().replace(**settings)}
