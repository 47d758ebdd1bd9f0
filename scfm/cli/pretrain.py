"""`scfm pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command


@command(
    example="scfm pretrain donor1.h5ad donor2.h5ad run --preset small --n-steps 10000 --validation 0.01",
    options_of="scfm.pretrain",
)
def pretrain(
    *paths: str,
    init: str = "svd",
    vocabulary: Path | None = None,
    medians: Path | None = None,
    validation: list[str] | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Train on files larger than memory; a run that was stopped resumes.

    Parameters
    ----------
    paths
        One or many inputs with raw counts (.h5ad, .zarr, URLs, or a .txt file that lists them), and last the folder of the run.
    init
        "svd": gene embeddings start from a decomposition of the data. "none": from random numbers. Or a model, which is
        trained further.
    vocabulary
        Vocabulary to use, as published or as scfm writes it, instead of the genes that the files express.
    medians
        Published medians of a rank encoding, instead of those of the files.
    validation
        Fraction of the cells to hold out, or files to take validation cells from; the weights with the lowest validation
        loss are kept.
    json
        Print the result as one JSON object instead of words.
    """
    sources, target = _files.inputs_and_output(paths)
    model = scfm.pretrain(
        sources,
        target,
        init=None if init == "none" else init,
        vocabulary=vocabulary,
        medians=medians,
        validation=_fraction_or_files(validation),
        **options,
    )
    facts = {"output": target, "model": target / "model", "model_id": model.id, "n_parameters": model.n_parameters}
    _files.tell(facts, as_json=json, text=f"{model!r}\nsaved as {target / 'model'}")


def _fraction_or_files(words: list[str] | None) -> float | list[str] | None:
    if words is None or len(words) != 1:
        return words
    try:
        return float(words[0])
    except ValueError:
        return words
