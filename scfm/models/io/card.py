"""The model card: what a stranger has to know before using a model, as far as the model itself knows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scfm.models.state import ModelState

TAGS = ["scfm", "single-cell", "transcriptomics", "anndata"]
UNSTATED = "Not stated by who saved the model."
LIMITS = """\
Research on single-cell expression: embedding, annotation, in-silico perturbation. Not for diagnosis or any clinical decision.

- Input is raw counts of genes under the names of the vocabulary; `scfm.pp.check(adata, model)` says what is missing.
- If a simple baseline in the table above scores higher, prefer it.
- Labels are those the model was trained on: a cell of another kind gets the nearest of them unless it is rejected.
- In-silico perturbation ranks genes by how they move the model's embedding: a hypothesis, not a measurement."""


def model_card(model: ModelState, *, name: str, data: str | None = None, license: str | None = None) -> str:
    """Write the model card of `model`, in Markdown with the head that model hubs read.

    Parameters
    ----------
    model
        Its history gives training and scores.
    name
        Title, and what `from_pretrained` opens in the card's example.
    data, license
        Cells it was trained on, in words; license of the weights, by its short name ("bsd-3-clause"). None writes that
        they are not stated.
    """
    sections = {
        "Use": _use(name),
        "Data": f"{data or UNSTATED}\n\n{_genes(model)}",
        "Training": _training(model),
        "Scores and simple baselines": _scores(model),
        "Intended use and limits": LIMITS,
        "License": license or UNSTATED,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    text = "\n".join(["", f"# {name}", "", f"`{model!r}`, id `{model.id}`.", "", body, ""])
    return f"---\n{_head(license)}\n---\n{text}"


def _head(license: str | None) -> str:
    """YAML that model hubs read; by huggingface_hub, which knows its fields, if it is installed."""
    facts: dict[str, Any] = {"library_name": "scfm", "license": license, "tags": TAGS}
    try:
        from huggingface_hub import ModelCardData
    except ImportError:  # JSON strings are YAML strings, whatever the name of the license holds
        return "\n".join(f"{name}: {json.dumps(value)}" for name, value in facts.items() if value is not None)
    return ModelCardData(**facts).to_yaml()


def _use(name: str) -> str:
    return (
        f'```python\nimport scfm\n\nmodel = scfm.Model.from_pretrained("{name}")\nscfm.tl.embed(adata, model)  # raw counts in '
        'adata.X; writes obsm["X_scfm"]\n```\n\nNothing in these files is executed: JSON and safetensors, no pickle.'
    )


def _genes(model: ModelState) -> str:
    vocabulary = model.encoding.vocabulary
    names = [vocabulary.tokens[index] for index in vocabulary.gene_ids[:3]]
    text = f"{len(vocabulary.gene_ids):,} genes, such as {', '.join(names)}."
    return text + (f" Labels: {', '.join(model.labels)}." if model.labels else "")


def _training(model: ModelState) -> str:
    lines = [_stage(stage) for stage in model.history.get("stages", [])]
    if data := model.history.get("data"):
        lines.append(f"- {data['n_obs']:,} cells of {len(data['files'])} files, fingerprint {data['sha256'][:16]}")
    lines += [f"- weights of a published checkpoint ({model.checkpoint.family})"] if model.checkpoint else []
    return "\n".join(lines) or UNSTATED


def _stage(stage: Mapping[str, Any]) -> str:
    losses, config = stage["losses"], stage["config"].get("config", stage["config"])  # nested by scfm.pretrain
    return (
        f"- {stage['name']}: objective `{stage['objective']}`, {len(losses):,} steps, "
        f"peak learning rate {config['learning_rate']:g}, seed {config['seed']}, "
        f"mean loss of the first and last ten steps {_mean(losses[:10]):.3f} and {_mean(losses[-10:]):.3f}"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _scores(model: ModelState) -> str:
    if model.scores is None:
        return "None: the model was not fitted with labels, so there is nothing to score it on."
    rows = model.scores
    columns = [name for name in ("accuracy", "macro_f1", "balanced_accuracy") if name in rows[0]]
    lines = ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {row['method']} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |" for row in rows]
    return "On the same held-out cells:\n\n" + "\n".join(lines)
