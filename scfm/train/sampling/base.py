"""The protocol of samplings, and their registry: each file of this package defines a subclass, which registers itself."""

# Axes: B cells of all files.

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scfm._config import did_you_mean
from scfm._registry import Registry
from scfm._remote import AnyPath
from scfm.errors import LabelsError

logger = logging.getLogger(__name__)

SAMPLINGS: Registry[type[Sampling]] = Registry("sampling", "scfm.train.sampling", first=("shuffled",))


@dataclass(frozen=True, kw_only=True)
class Sampling(ABC):
    """How often each cell is drawn in an epoch.

    A sampling gives every cell a weight. The expected number of draws of a cell in an epoch is proportional to its weight, and
    the mean over all cells is 1, so an epoch is as long as one that reads every cell once. The files are still read in blocks,
    each once per epoch, so all draws of a cell are in one buffer of `CellStream`. Hence a cell is drawn at most `max_repeats`
    times per epoch: otherwise a rare cell would fill the batches of that buffer. The draws that are cut off go to other cells.

    A new sampling is a subclass in a new file of this package, with a `name` and the method `weights`.

    Attributes
    ----------
    name
        Name on the command line.
    max_repeats
        Maximum number of draws of a cell in an epoch.
    """

    name: ClassVar[str]
    max_repeats: int = 10

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        SAMPLINGS.add(cls.name, cls)

    def __post_init__(self) -> None:
        if self.max_repeats < 1:
            raise ValueError(f"`max_repeats` is {self.max_repeats}; it must be at least 1.")

    @classmethod
    @abstractmethod
    def from_argument(cls, argument: str) -> Sampling:
        """Return the sampling for the text after the colon in "name:argument", which is empty without a colon."""

    @abstractmethod
    def weights(self, paths: Sequence[AnyPath], rows: Sequence[int]) -> NDArray[np.floating] | None:
        """Return the weight of each cell of all files, shape (B,), not negative; None if every cell is drawn once.

        Parameters
        ----------
        paths, rows
            The files, and the number of cells of each. Only `obs` may be read, not counts.

        Raises
        ------
        LabelsError
            If a column of `obs` is missing or unfit.
        """

    def repeats(
        self, paths: Sequence[AnyPath], rows: Sequence[int], used_B: NDArray[np.bool_] | None
    ) -> NDArray[np.float32] | None:
        """Return the expected number of draws of each cell, shape (B,); None if every used cell is drawn once.

        Parameters
        ----------
        paths, rows
            The files, and the number of cells of each.
        used_B
            Cells that may be drawn, shape (B,); None for all.
        """
        weight_B = self.weights(paths, rows)
        if weight_B is None:
            return None
        repeats_B = np.array(weight_B, dtype=np.float32)
        if used_B is not None:
            repeats_B[~used_B] = 0
        n_used = len(repeats_B) if used_B is None else int(used_B.sum())
        return self._scaled(repeats_B, n_used)

    def _scaled(self, repeats_B: NDArray[np.float32], n_draws: int) -> NDArray[np.float32]:
        """Scale weights so that their sum is the number of draws, with at most `max_repeats` for each cell."""
        if n_draws and not repeats_B.any():
            raise LabelsError(f"The weights of {self.to_text()!r} are 0 for all cells that may be drawn.")
        n_cut, limit = 0, np.float32(self.max_repeats)
        while n_draws:
            free_B = repeats_B < limit if n_cut else np.ones(len(repeats_B), dtype=bool)
            total = float(repeats_B[free_B].sum(dtype=np.float64))
            if total > 0:
                repeats_B[free_B] *= np.float32((n_draws - n_cut * self.max_repeats) / total)
            np.minimum(repeats_B, limit, out=repeats_B)
            before, n_cut = n_cut, int((repeats_B >= limit).sum())
            if n_cut == before or n_cut * self.max_repeats >= n_draws:
                break
        if n_cut:
            logger.warning(
                "%s: %d of %d cells would be drawn more than %d times per epoch, and are drawn %d times (`max_repeats`).",
                self.to_text(),
                n_cut,
                n_draws,
                self.max_repeats,
                self.max_repeats,
            )
        return repeats_B

    def to_text(self) -> str:
        """Return the text that `make_sampling` reads, without settings that cannot be written in it."""
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the name and all settings as JSON values, which a run records."""
        return {"name": self.name, **asdict(self)}


def make_sampling(sampling: str | Sampling) -> Sampling:
    """Return a sampling; a text is a name, with an argument after a colon if the sampling has one.

    Raises
    ------
    ValueError
        If there is no sampling of this name, or the argument is missing or not wanted.

    Examples
    --------
    >>> from scfm.train import sampling
    >>> sampling.make_sampling("balanced:cell_type")
    Balanced(max_repeats=10, column='cell_type')
    """
    if isinstance(sampling, Sampling):
        return sampling
    name, _, argument = sampling.partition(":")
    if name not in SAMPLINGS:
        raise ValueError(
            f"`sampling` is {sampling!r}, which does not exist.{did_you_mean(name, list(SAMPLINGS))} "
            f"Known: {', '.join(SAMPLINGS)}."
        )
    return SAMPLINGS[name].from_argument(argument)


def refuse_argument(name: str, argument: str) -> None:
    """Raise for an argument of a sampling that has none."""
    if argument:
        raise ValueError(
            f"`sampling` is {f'{name}:{argument}'!r}, but {name!r} has no argument. Omit {f':{argument}'!r}."
        )


def require_column(name: str, argument: str) -> str:
    """Return the argument of a sampling that needs a column; raise if it is missing."""
    if not argument:
        raise ValueError(f"`sampling` is {name!r}, which needs a column of `obs`: {f'{name}:COLUMN'!r}.")
    return argument
