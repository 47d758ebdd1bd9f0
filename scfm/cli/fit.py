"""`scfm fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command


@command(example="scfm fit pbmc.h5ad pbmc_model --labels-key cell_type", options_of="scfm.fit", leave_out={"key_added"})
def fit(data: Path, output: Path, /, *, json: bool = False, **options: Any) -> None:
    """Train a model on raw counts and save it; with labels, compare it with simple baselines.

    Parameters
    ----------
    data
        .h5ad or .zarr with raw counts.
    output
        Directory to save the model in; an existing model is replaced.
    json
        Print the result as one JSON object instead of words.
    """
    from scfm.models.io.save import require_replaceable

    require_replaceable(output)
    model = scfm.fit(_files.read(data), **options)
    model.save(output)
    report = model.report() if model.scores is not None else None
    facts: dict[str, Any] = {"model": output, "model_id": model.id, "n_parameters": model.n_parameters}
    text = f"{model!r}\nsaved as {output}"
    if report is not None:
        facts["report"] = _files.records(report)
        text = f"{report.round(3).to_string()}\n{text}"
    _files.tell(facts, as_json=json, text=text)
