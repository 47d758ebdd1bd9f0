"""The model card: training data, scores, intended use and limits of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scfm.models.state import ModelState

TAGS = ["scfm", "single-cell", "transcriptomics", "anndata"]
UNSTATED = "Not stated."
LIMITS = """\
This model is for research on single-cell expression: embedding, annotation, in-silico perturbation. It is not for diagnosis
or any clinical decision.

- The input must be raw counts, with genes named as in the vocabulary; `scfm.pp.check(adata, model)` reports problems.
- If a simple baseline in the table above has a higher score, use the baseline.
- The model can only predict labels that it was trained on. A cell of another type gets the most similar label or is rejected.
- In-silico perturbation ranks genes by the change of the model's embedding. This is a hypothesis, not a measurement."""


def model_card(model: ModelState, *, name: str, data: str | None = None, license: str | None = None) -> str:
    """Return the model card of `model` as Markdown, with the YAML header that model hubs read.

    Parameters
    ----------
    model
        The model; training and scores are read from its history.
    name
        Title of the card, and the name that its example opens.
    data, license
        Description of the training cells, and short name of the license of the weights ("bsd-3-clause"). None if they are
        not stated.
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
    """Return the YAML header for model hubs; huggingface_hub writes it if it is installed."""
    facts: dict[str, Any] = {"library_name": "scfm", "license": license, "tags": TAGS}
    try:
        from huggingface_hub import ModelCardData
    except ImportError:  # a JSON string is a valid YAML string
        return "\n".join(f"{name}: {json.dumps(value)}" for name, value in facts.items() if value is not None)
    return ModelCardData(**facts).to_yaml()


def _use(name: str) -> str:
    return (
        f'```python\nimport scfm\n\nmodel = scfm.Model.from_pretrained("{name}")\nscfm.tl.embed(adata, model)  # raw counts in '
        'adata.X; writes obsm["X_scfm"]\n```\n\nThe files are JSON and safetensors. They contain no code.'
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
        return "The model has no scores, because it was fitted without labels."
    rows = model.scores
    columns = [name for name in ("accuracy", "macro_f1", "balanced_accuracy") if name in rows[0]]
    lines = ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {row['method']} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |" for row in rows]
    return "On the same held-out cells:\n\n" + "\n".join(lines)
