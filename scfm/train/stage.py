"""Train a model on cells in memory, and record the training in its history."""

from __future__ import annotations

from scfm.data import CellBatch
from scfm.models.model import Model
from scfm.objectives import Objective
from scfm.train.config import FitConfig


def run_stage(
    model: Model, name: str, *, objective: Objective, cells: CellBatch, config: FitConfig, progress: bool = True
) -> None:
    """Train the network of `model` in place and append settings and losses to `model.history["stages"]`.

    Parameters
    ----------
    model
        The model, which is changed in place.
    name
        Name of the stage, for history and progress bar.
    objective
        The training objective.
    cells
        Encoded cells.
    config
        Settings of the stage.
    progress
        Whether to show a progress bar.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:50].copy()
    >>> short = scfm.FitConfig(n_steps=2, tokens_per_step=512)
    >>> model = scfm.fit(adata, config=short, progress=False)
    >>> objective = scfm.objectives.make_objective(model.objective, model.network, model.encoding)
    >>> cells = scfm.pp.encode(adata, model)
    >>> scfm.train.run_stage(
    ...     model, "more pretraining", objective=objective, cells=cells, config=short, progress=False
    ... )
    >>> [stage["name"] for stage in model.history["stages"]]
    ['pretraining', 'more pretraining']
    """
    from scfm.train.loop import train  # Lightning takes seconds to import

    module = train(model.network, objective, cells, config, title=name, progress=progress)
    stage = {
        "name": name,
        "objective": objective.name,
        "config": module.config.to_dict(),
        "losses": [float(loss) for loss in module.losses],
    }
    model.history.setdefault("stages", []).append(stage)
