"""Effect on a cell when the ranks of all genes after one decrease by 1: exact at some positions, interpolated between them."""

# Axes: T packed tokens, V exact positions of all cells, N tokens of one cell, K exact positions of one, D model width.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.data import CellBatch
from scfm.models.network import CellTransformer, Readout
from scfm.perturbation.edits import TokenCell
from scfm.perturbation.runner import embed_variants
from scfm.perturbation.variants import at_positions, cell_of


def sum_of_later(values_T: Tensor, cells: CellBatch) -> Tensor:
    """Return the sum over the later tokens of the cell, shape (T,) or (T, D)."""
    upto_T = values_T.cumsum(0)
    return upto_T[cells.cu_seqlens[1:].long() - 1][cells.cell_of_token_T()] - upto_T


@torch.no_grad()
def own_paths(
    network: CellTransformer,
    readout: Readout,
    cells: CellBatch,
    *,
    keys: Sequence[tuple[Tensor, Tensor]],
    states_TD: Tensor,
) -> Tensor:
    """Return the effect of changed ranks of later tokens through their own states, shape (T, D), float64.

    The state of each token is computed for a rank one higher, with unchanged keys and values of the cell, in one pass for
    all tokens. The result is exact except for the effects of tokens on other tokens. It is zero if the vector is the `cls`
    state, whose rank does not change.

    Parameters
    ----------
    network, cells
        The network and the unchanged cells.
    readout
        The vector of the cells.
    keys
        Keys and values of each block that the readout needs, each of shape (T, H, K).
    states_TD
        Token states that the readout pools, at unchanged ranks.
    """
    if readout.pooling == "cls":
        return torch.zeros_like(states_TD, dtype=torch.float64)
    moved = at_positions(cells, (cells.position_T() - 1).clamp(min=0))
    hidden_TD = network.states_with_keys(readout, moved, keys)
    cell_T = cells.cell_of_token_T()
    weight_T, moved_T = (network.pooling_weights(batch, readout.pooling).double() for batch in (cells, moved))
    total_B = torch.zeros(len(cells), dtype=torch.float64, device=cells.device).index_add_(0, cell_T, weight_T)
    mean_TD = network.pool(states_TD, cells, readout.pooling).double()[cell_T]
    step_TD = moved_T[:, None] * (hidden_TD.double() - mean_TD) - weight_T[:, None] * (states_TD.double() - mean_TD)
    return sum_of_later(step_TD / torch.where(total_B > 0, total_B, 1.0)[cell_T, None], cells)


@dataclass(frozen=True)
class RankMoves:
    """Changes of the vectors of a batch of cells when every token after one moves up by one rank.

    Attributes
    ----------
    exact_at
        Positions of each cell with exact changes, ascending from the first to the last.
    left_T, right_T, fraction_T1
        For each token, the nearest tokens with exact changes on both sides, and its relative position between them, 0 to 1.
    exact_TD
        Changes at the exact positions, float64; zeros elsewhere.
    """

    exact_at: tuple[NDArray[np.int64], ...]
    left_T: Tensor
    right_T: Tensor
    fraction_T1: Tensor
    exact_TD: Tensor

    @classmethod
    def of(
        cls, network: CellTransformer, readout: Readout, cells: CellBatch, vector_BD: Tensor, n_ranks: int
    ) -> RankMoves:
        """Compute the changes at `n_ranks` positions of each cell; `vector_BD` are the vectors of the unchanged cells."""
        lengths, on_host = cells.lengths_B.tolist(), cells.to("cpu")
        exact_at = tuple(np.unique(np.linspace(0, length - 1, n_ranks).round().astype(np.int64)) for length in lengths)
        # No token follows the last one, so its change is zero.
        wanted = [(cell, int(index)) for cell, exact_K in enumerate(exact_at) for index in exact_K[:-1]]
        variants = [_moved_up(cell_of(on_host, cell), index) for cell, index in wanted]
        moved_VD = torch.from_numpy(embed_variants(network, variants, readout)).to(cells.device).double()
        cell_V, index_V = torch.tensor(wanted, dtype=torch.int64, device=cells.device).view(-1, 2).unbind(1)
        exact_TD = moved_VD.new_zeros(cells.n_tokens, moved_VD.shape[1])
        exact_TD[cells.cu_seqlens[cell_V].long() + index_V] = moved_VD - vector_BD.double()[cell_V]
        return cls(exact_at, *_neighbors(exact_at, cells), exact_TD)

    def following(self, guide_TX: Tensor, exact_TX: Tensor) -> Tensor:
        """Return exact values, and between them the guide plus a linear correction, shape (T, X)."""
        error_TX = exact_TX - guide_TX
        return guide_TX + torch.lerp(error_TX[self.left_T], error_TX[self.right_T], self.fraction_T1)


def _moved_up(cell: TokenCell, index: int) -> TokenCell:
    position_N = np.arange(len(cell))
    position_N[index + 1 :] -= 1
    return TokenCell(cell.gene_ids_N, cell.values_N, position_N)


def _neighbors(exact_at: tuple[NDArray[np.int64], ...], cells: CellBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest tokens with exact changes on both sides of each token, and its relative position between them."""
    left, right, fraction = [], [], []
    for start, exact_K in zip(cells.cu_seqlens.tolist(), exact_at):
        index_N = np.arange(exact_K[-1] + 1)
        right_N = np.searchsorted(exact_K, index_N)
        left_N = (right_N - 1).clip(min=0)
        left.append(start + exact_K[left_N])
        right.append(start + exact_K[right_N])
        fraction.append((index_N - exact_K[left_N]) / np.maximum(exact_K[right_N] - exact_K[left_N], 1))
    left_T, right_T, fraction_T = (
        torch.from_numpy(np.concatenate(parts)).to(cells.device) for parts in (left, right, fraction)
    )
    return left_T, right_T, fraction_T[:, None]
