"""What a pretraining run leaves behind: model, losses, figure, model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from scfm.models import Model

CARD = """---
library_name: scfm
tags: [single-cell, transformer, {encoding}]
---
# Pretrained on {n_obs:,} cells

| | |
| --- | --- |
| model | {model} |
| id | {model_id} |
| preset, encoding, objective | {preset}, {encoding}, {objective} |
| vocabulary | {n_genes:,} genes ({id_type}) |
| steps, tokens a step, seed | {n_steps:,}, {tokens_per_step:,}, {seed} |
| loss, first and last ten steps | {first:.3f} to {last:.3f} |
| data fingerprint | {sha256} |

Trained on: {files}.

Open it with `scfm.load("model")`. Embeddings are meant for cells of the same organism and gene naming. No labels were seen;
compare with simple baselines before relying on it (`scfm.fit(adata, labels_key=...)` prints them).
"""


def write_run(
    out: Path, model: Model, config: dict[str, Any], fingerprint: dict[str, Any], losses: list[float]
) -> None:
    """Write `model/`, `losses.csv`, `losses.png` and the model card `README.md` into `out`."""
    model.save(out / "model")
    table = pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses})
    table.to_csv(out / "losses.csv", index=False)
    _draw(table, out / "losses.png")
    vocabulary = model.encoding.vocabulary
    card = CARD.format(
        encoding=config["encoding"], preset=config["preset"], objective=config["objective"],
        n_obs=fingerprint["n_obs"], sha256=fingerprint["sha256"][:16], files=", ".join(f["file"] for f in fingerprint["files"]),
        model=repr(model), model_id=model.id, n_genes=vocabulary.n_genes, id_type=vocabulary.id_type,
        n_steps=config["fit"]["n_steps"], tokens_per_step=config["fit"]["tokens_per_step"], seed=config["fit"]["seed"],
        first=table["loss"].head(10).mean(), last=table["loss"].tail(10).mean(),
    )  # fmt: skip
    (out / "README.md").write_text(card)


def _draw(table: pd.DataFrame, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="tight")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.plot(table["step"], table["loss"], color="#BBBBBB", lw=0.8, label="each step")
    smooth = table["loss"].rolling(max(1, len(table) // 20), min_periods=1).mean()
    ax.plot(table["step"], smooth, color="#0072B2", label="running mean")
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)
