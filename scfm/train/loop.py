"""`train`: run one stage of training on encoded cells."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from scfm import objectives
from scfm.data import CellBatch, TokenBudgetSampler
from scfm.models.network import CellTransformer
from scfm.train.callbacks import ProgressBar, StopOnNonFiniteLoss
from scfm.train.config import FitConfig
from scfm.train.module import TrainingModule

# (number of the step in the whole run, rows of its cells)
StepRows = tuple[int, NDArray[np.int64]]


@dataclass(frozen=True)
class StepSampler(Sampler[StepRows]):
    """Endless epochs of token-budget batches, numbered, so that a step's masks depend on its number alone."""

    batches: TokenBudgetSampler
    n_steps: int

    def __iter__(self) -> Iterator[StepRows]:
        step, epoch = 0, 0
        while step < self.n_steps:
            self.batches.set_epoch(epoch)
            for rows in self.batches:
                yield step, rows
                step += 1
                if step == self.n_steps:
                    return
            epoch += 1

    def __len__(self) -> int:
        return self.n_steps


@dataclass(frozen=True)
class StepDataset(Dataset[tuple[CellBatch, objectives.Targets]]):
    """Encoded cells, handed out as the corrupted batch of a step."""

    cells: CellBatch
    objective: objectives.Objective
    seed: int

    def __getitem__(self, step_rows: StepRows) -> tuple[CellBatch, objectives.Targets]:
        step, rows = step_rows
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return self.objective.corrupt(self.cells.select(rows), generator)


def train(
    network: CellTransformer,
    objective: objectives.Objective,
    cells: CellBatch,
    config: FitConfig,
    *,
    title: str,
    progress: bool = True,
    callbacks: Sequence[lightning.Callback] = (),
) -> list[float]:
    """Train `network` in place on all of `cells`, and return the loss of every step.

    With the same seed, machine and thread count the result is the same to the bit.
    """
    lengths = cells.lengths_B.numpy()
    sampler = StepSampler(
        TokenBudgetSampler(lengths, max_tokens=config.tokens_per_step, seed=config.seed), config.n_steps
    )
    loader = DataLoader(StepDataset(cells, objective, config.seed), sampler=sampler, batch_size=None)
    module = TrainingModule(network, objective, config)
    own_callbacks: list[lightning.Callback] = [StopOnNonFiniteLoss()]
    if progress:
        own_callbacks.append(ProgressBar(title))
    with quiet_lightning(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        trainer = lightning.Trainer(
            max_steps=config.n_steps,
            max_epochs=-1,
            accelerator=config.accelerator,
            devices=config.devices,
            precision=config.precision,
            gradient_clip_val=config.clip_norm,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[*own_callbacks, *callbacks],
        )
        network.train()
        trainer.fit(module, loader)
    network.eval()
    return [float(loss) for loss in module.losses]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave Lightning's warnings about workers and its notes about devices out of a user's notebook."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", category=UserWarning, message=r".*does not have many workers.*")
        try:
            yield
        finally:
            logger.setLevel(level)
