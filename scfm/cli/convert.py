"""`scfm convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm.cli import _files
from scfm.cli._registry import command


@command(
    example="scfm convert Geneformer/Geneformer-V1-10M geneformer_v1",
    options_of="scfm.families.convert",
    choices={"to": "scfm.families.FAMILIES"},
)
def convert(
    checkpoint: Path,
    output: Path,
    /,
    *,
    to: str | None = None,
    vocabulary: Path | None = None,
    medians: Path | None = None,
    strict: bool = True,
    json: bool = False,
    **options: Any,
) -> None:
    """Read a model in one format and write it in another.

    Parameters
    ----------
    checkpoint
        A saved scfm model, or a published checkpoint.
    output
        Directory or file to write.
    to
        Format to write. By default, a published checkpoint is converted to scfm's format, and an scfm model to the format of
        the published family with the same encoding.
    vocabulary
        For published checkpoints without one in their directory: the published pickle, JSON, or a TSV.
    medians
        For Geneformer: the published pickle, or a JSON file of gene to median.
    strict
        Whether tensors that are missing, unknown or of the wrong shape are an error. Without it, the tensors that match are
        loaded, with a warning.
    json
        Print the result as one JSON object instead of words.
    """
    model = scfm.families.convert(
        checkpoint, output, to=to, vocabulary=vocabulary, medians=medians, strict=strict, **options
    )
    unused = dict(model.checkpoint.unused) if model.checkpoint else {}
    text = f"{model!r}\nwritten to {output}"
    if unused:
        text += f"\nnot used ({len(unused)} tensors): {', '.join(unused)}"
    _files.tell({"output": output, "model_id": model.id, "unused": unused}, as_json=json, text=text)
