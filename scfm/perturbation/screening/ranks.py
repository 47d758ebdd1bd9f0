"""What it does to a cell when all its genes after one move up a rank: exact at few places, own paths between."""

# Axes: T packed tokens, V known places of all cells, N tokens of one cell, K known places of one, D model width.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.data import CellBatch
from scfm.models.network import CellTransformer
from scfm.perturbation.edits import TokenCell
from scfm.perturbation.runner import embed_variants
from scfm.perturbation.variants import at_positions, cell_of


def sum_of_later(values_T: Tensor, cells: CellBatch) -> Tensor:
    """Sum over the later tokens of the cell, shape (T,) or (T, D)."""
    upto_T = values_T.cumsum(0)
    return upto_T[cells.cu_seqlens[1:].long() - 1][cells.cell_of_token_T()] - upto_T


@torch.no_grad()
def own_paths(
    network: CellTransformer, cells: CellBatch, keys: Sequence[tuple[Tensor, Tensor]], states_TD: Tensor
) -> Tensor:
    """What moving all later tokens up a rank does by their own paths, to the mean of gene states, shape (T, D), float64.

    Each token's state is worked out a rank higher in a cell whose keys and values stay as they are: one pass for all tokens,
    and what a token takes in place of `states_TD` is exact but for its effect on others. Zeros where the embedding is the
    `cls` state, which does not move.

    Parameters
    ----------
    network, cells
        As they are.
    keys
        Keys and values, (T, H, K), of each layer below the embedding.
    states_TD
        States of the tokens in their places, of the layer that cells are embedded by.
    """
    if network.config.pooling.how == "cls":
        return torch.zeros_like(states_TD, dtype=torch.float64)
    moved = at_positions(cells, (cells.position_T() - 1).clamp(min=0))
    hidden_TD = network.states_with_keys(moved, keys)
    is_gene_T = network.is_gene_T(cells)
    cell_T = cells.cell_of_token_T()
    n_genes_B = torch.zeros(len(cells), device=cells.device).index_add_(0, cell_T, is_gene_T.float()).clamp(min=1)
    step_TD = (hidden_TD.double() - states_TD.double()) * (is_gene_T / n_genes_B[cell_T])[:, None]
    return sum_of_later(step_TD, cells)


@dataclass(frozen=True)
class RankMoves:
    """Moves of the embeddings of a batch of cells when every token after one moves up a rank.

    Attributes
    ----------
    places
        Of each cell, its places at which the move is known, ascending from 0 to its last.
    left_T, right_T, share_T1
        The known tokens about each token, and how far it stands from the left to the right one.
    exact_TD
        The move at the known places, float64; zeros elsewhere.
    """

    places: tuple[NDArray[np.int64], ...]
    left_T: Tensor
    right_T: Tensor
    share_T1: Tensor
    exact_TD: Tensor

    @classmethod
    def of(cls, network: CellTransformer, cells: CellBatch, embedding_BD: Tensor, n_ranks: int) -> RankMoves:
        """Compute the moves at `n_ranks` places of each cell; `embedding_BD` are the embeddings of the cells as they are."""
        lengths, on_host = cells.lengths_B.tolist(), cells.to("cpu")
        places = tuple(np.unique(np.linspace(0, length - 1, n_ranks).round().astype(np.int64)) for length in lengths)
        # After the last token nothing moves.
        wanted = [(cell, int(place)) for cell, known in enumerate(places) for place in known[:-1]]
        variants = [_moved_up(cell_of(on_host, cell), place) for cell, place in wanted]
        moved_VD = torch.from_numpy(embed_variants(network, variants)).to(cells.device).double()
        cell_V, place_V = torch.tensor(wanted, dtype=torch.int64, device=cells.device).view(-1, 2).unbind(1)
        exact_TD = moved_VD.new_zeros(cells.n_tokens, moved_VD.shape[1])
        exact_TD[cells.cu_seqlens[cell_V].long() + place_V] = moved_VD - embedding_BD.double()[cell_V]
        return cls(places, *_lines(places, cells), exact_TD)

    def following(self, guide_TX: Tensor, exact_TX: Tensor) -> Tensor:
        """What is exact at the known places, and between them the guide, plus a straight line for its errors; (T, X)."""
        error_TX = exact_TX - guide_TX
        return guide_TX + torch.lerp(error_TX[self.left_T], error_TX[self.right_T], self.share_T1)


def _moved_up(cell: TokenCell, place: int) -> TokenCell:
    place_N = np.arange(len(cell))
    place_N[place + 1 :] -= 1
    return TokenCell(cell.gene_ids_N, cell.values_N, place_N)


def _lines(places: tuple[NDArray[np.int64], ...], cells: CellBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The known tokens to the left and right of each token, and its share of the way between them."""
    left, right, share = [], [], []
    for start, known_K in zip(cells.cu_seqlens.tolist(), places):
        place_N = np.arange(known_K[-1] + 1)
        right_N = np.searchsorted(known_K, place_N)
        left_N = (right_N - 1).clip(min=0)
        left.append(start + known_K[left_N])
        right.append(start + known_K[right_N])
        share.append((place_N - known_K[left_N]) / np.maximum(known_K[right_N] - known_K[left_N], 1))
    left_T, right_T, share_T = (
        torch.from_numpy(np.concatenate(parts)).to(cells.device) for parts in (left, right, share)
    )
    return left_T, right_T, share_T[:, None]
