"""What it does to a cell when all its genes after one move up a rank: exact at few places, interpolated between."""

# Axes: B cells, T packed tokens, N tokens of one cell, K known places, D model width.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.data import CellBatch
from scfm.models.network import CellTransformer
from scfm.tl._perturb.edits import TokenCell
from scfm.tl._perturb.stream import embed_variants
from scfm.tl._perturb.variants import cell_of

N_RANKS = 9  # 5 lose up to a quarter of the best 50 toward a goal, 17 gain no more than a twentieth


@dataclass(frozen=True)
class RankMoves:
    """Moves of the embeddings of a batch of cells.

    Attributes
    ----------
    places
        Of each cell, its places that are known, ascending from 0 to its last.
    displacement_TD
        Move of the cell's embedding when every token after this one moves up a rank, shape (T, D), float64.
    """

    places: tuple[NDArray[np.int64], ...]
    displacement_TD: Tensor

    @classmethod
    def of(cls, network: CellTransformer, cells: CellBatch, embedding_BD: Tensor) -> RankMoves:
        """Compute the moves; `embedding_BD` are the embeddings of the cells as they are."""
        lengths = cells.lengths_B.tolist()
        places = tuple(np.unique(np.linspace(0, length - 1, N_RANKS).round().astype(np.int64)) for length in lengths)
        # After the last token nothing moves.
        on_host = cells.to("cpu")
        variants = [
            _moved_up(cell_of(on_host, cell), int(place)) for cell, known in enumerate(places) for place in known[:-1]
        ]
        moved_VD = embed_variants(network, variants).astype(np.float64)
        parts, first = [], 0
        for known, length, before_D in zip(places, lengths, embedding_BD.double().cpu().numpy()):
            n_moved = len(known) - 1
            step_KD = np.concatenate([moved_VD[first : first + n_moved] - before_D, np.zeros((1, len(before_D)))])
            parts.append(_between(known, step_KD, length))
            first += n_moved
        return cls(places, torch.from_numpy(np.concatenate(parts)).to(cells.device))

    def interpolate(self, values_T: Tensor) -> Tensor:
        """Draw straight lines through a quantity at the known places, shape (T,), float64."""
        lengths = [int(known[-1]) + 1 for known in self.places]
        parts = [
            np.interp(np.arange(len(values_N)), known, values_N.numpy()[known])
            for known, values_N in zip(self.places, values_T.cpu().split(lengths))
        ]
        return torch.from_numpy(np.concatenate(parts)).to(values_T.device)


def _moved_up(cell: TokenCell, place: int) -> TokenCell:
    place_N = np.arange(len(cell))
    place_N[place + 1 :] -= 1
    return TokenCell(cell.gene_ids_N, cell.values_N, place_N)


def _between(known_K: NDArray[np.int64], values_KD: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Straight lines between the rows of known places, shape (length, D)."""
    place_N = np.arange(length)
    right_N = np.searchsorted(known_K, place_N).clip(min=1, max=max(len(known_K) - 1, 1))
    if len(known_K) == 1:
        return np.repeat(values_KD, length, 0)
    left_K, right_K = known_K[right_N - 1], known_K[right_N]
    share_N1 = ((place_N - left_K) / (right_K - left_K))[:, None]
    return (1 - share_N1) * values_KD[right_N - 1] + share_N1 * values_KD[right_N]
