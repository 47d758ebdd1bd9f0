"""Sampling: every cell once per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from scfm._remote import AnyPath
from scfm.train.sampling.base import Sampling, refuse_argument


@dataclass(frozen=True, kw_only=True)
class Shuffled(Sampling):
    """Every cell is drawn once per epoch."""

    name: ClassVar[str] = "shuffled"

    @classmethod
    def from_argument(cls, argument: str) -> Shuffled:
        refuse_argument(cls.name, argument)
        return cls()

    def weights(self, paths: Sequence[AnyPath], rows: Sequence[int]) -> None:
        return None
