"""`scfm fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command

OF_THE_MACHINE = ("tokens_per_step", "precision", "accelerator", "devices", "n_nodes", "strategy", "compile")


@command(
    example="scfm fit pbmc.h5ad pbmc_model --labels-key cell_type",
    options_of="scfm.fit",
    leave_out={"key_added", "pretrain_config"},
)
def fit(
    data: Path,
    output: Path,
    /,
    *,
    n_steps: int | None = None,
    pretrain_steps: int | None = None,
    pretrain_learning_rate: float | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Train a model on raw counts and save it; with labels, compare it with simple baselines.

    Parameters
    ----------
    data
        .h5ad or .zarr with raw counts.
    output
        Directory to save the model in; an existing model is replaced.
    n_steps
        Optimizer steps of fine-tuning, or of the only stage without labels; so are the training options below. By default,
        chosen by the number of cells.
    pretrain_steps
        Optimizer steps of pretraining, with --labels-key. By default, chosen by the number of cells.
    pretrain_learning_rate
        Peak learning rate of pretraining, with --labels-key. By default, 1e-3.
    json
        Print the result as one JSON object instead of words.
    """
    from scfm.models.io.save import require_replaceable

    require_replaceable(output)
    adata = _files.read(data)
    options |= _stages(options, n_steps, pretrain_steps, pretrain_learning_rate, adata.n_obs)
    model = scfm.fit(adata, **options)
    model.save(output)
    report = model.report() if model.scores is not None else None
    facts: dict[str, Any] = {"model": output, "model_id": model.id, "n_parameters": model.n_parameters}
    text = f"{model!r}\nsaved as {output}"
    if report is not None:
        facts["report"] = _files.records(report)
        text = f"{report.round(3).to_string()}\n{text}"
    _files.tell(facts, as_json=json, text=text)


def _stages(
    options: dict[str, Any],
    n_steps: int | None,
    pretrain_steps: int | None,
    pretrain_learning_rate: float | None,
    n_cells: int,
) -> dict[str, Any]:
    """Settings of the stages; what was not given is chosen by the number of cells, as without any option."""
    usual = scfm.FitConfig.for_cells(n_cells, seed=options.get("seed"))
    stages = {}
    tuning = options.get("config")
    if tuning is not None or n_steps is not None:
        labeled = options.get("labels_key") is not None
        by_cells = max(15, usual.n_steps // 2) if labeled else usual.n_steps
        steps = by_cells if n_steps is None else n_steps
        stages["config"] = (tuning or usual).replace(n_steps=steps)
    given = {"n_steps": pretrain_steps, "learning_rate": pretrain_learning_rate}
    if given := {name: value for name, value in given.items() if value is not None}:
        if options.get("labels_key") is None:
            raise ValueError(
                "--pretrain-steps and --pretrain-learning-rate are for a model with labels, whose second stage is "
                "fine-tuning. Use --n-steps and --learning-rate, or pass --labels-key."
            )
        if tuning is not None:
            usual = usual.replace(**{name: getattr(tuning, name) for name in OF_THE_MACHINE})
        stages["pretrain_config"] = usual.replace(**given)
    return stages
