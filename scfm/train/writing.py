"""Write the results of a pretraining run: model, losses, figure, model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from scfm._files import atomic_write
from scfm.models import Model
from scfm.models.io.card import model_card

if TYPE_CHECKING:
    from scfm.train.module import TrainingModule


def write_run(
    out: Path, model: Model, *, module: TrainingModule, settings: dict[str, Any], fingerprint: dict[str, Any]
) -> None:
    """Write `model/`, `losses.csv`, `losses.png` and the model card `README.md` into `out`."""
    model.save(out / "model")
    losses = [float(loss) for loss in module.losses]
    table = pd.DataFrame({"loss": losses}, index=pd.RangeIndex(1, len(losses) + 1, name="step"))
    if module.validation_losses:
        table["validation_loss"] = pd.Series(dict(module.validation_losses))
    with atomic_write(out / "losses.csv") as temporary_path:
        table.to_csv(temporary_path)
    with atomic_write(out / "losses.png") as temporary_path:
        _draw(table, temporary_path)
    files = ", ".join(file["file"] for file in fingerprint["files"])
    start = settings["init"] or "random numbers"
    data = f"{files}. Started from {start}. Validation loss: {_best(table)}."
    card = model_card(model, name=str(out / "model"), data=data)
    with atomic_write(out / "README.md") as temporary_path:
        temporary_path.write_text(card)


def _best(table: pd.DataFrame) -> str:
    if "validation_loss" not in table:
        return "not measured"
    return (
        f"{table['validation_loss'].min():.3f} at step {table['validation_loss'].idxmin():,}, whose weights these are"
    )


def _draw(table: pd.DataFrame, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="tight")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.plot(table.index, table["loss"], color="#BBBBBB", lw=0.8, label="each step")
    smooth = table["loss"].rolling(max(1, len(table) // 20), min_periods=1).mean()
    ax.plot(table.index, smooth, color="#0072B2", label="running mean")
    if "validation_loss" in table:
        validation = table["validation_loss"].dropna()
        ax.plot(validation.index, validation, "o-", color="#D55E00", ms=3, label="validation")
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
