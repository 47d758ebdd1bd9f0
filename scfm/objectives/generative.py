"""Generative pretraining: predict the values of target genes from context genes (scGPT)."""

# Axes: B cells, T packed tokens, N target tokens, D model width.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.nn.values import MASK_VALUE
from scfm.objectives.base import OBJECTIVES, Loss, PretrainingObjective, Targets, Term
from scfm.objectives.masked import values_of
from scfm.objectives.values import squared_error, value_terms

if TYPE_CHECKING:
    from scfm.encoding import Encoding

SECOND_PASS_STEPS = 1000  # the published training of scGPT adds the second pass after these steps


@dataclass(frozen=True)
class Generative:
    """Prediction of the values of target genes under the generative mask, with the losses GEP and MVC.

    For each batch a fraction is drawn from `target_fractions`. This fraction of each cell's genes becomes targets: they
    are moved behind the context genes, their values are hidden, and no other token attends to them. The loss is GEP +
    `cell_weight` MVC (see `scfm.objectives.values`). With `second_pass`, the network is applied a second time with the
    detached cell embedding as the input of each cell's first token, and the GEP of this pass is added. In training, the
    second pass starts at step `second_pass_from` (1,000 in the published code), so the loss increases there.

    Examples
    --------
    >>> import torch, scfm
    >>> cells = scfm.CellBatch(
    ...     gene_ids_T=torch.arange(2, 10, dtype=torch.int32), values_T=torch.arange(8.0), cu_seqlens=torch.tensor([0, 8])
    ... )
    >>> objective = scfm.objectives.Generative(is_gene_V=torch.arange(20) > 1, target_fractions=(0.25,))
    >>> inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    >>> inputs.n_known.tolist(), targets["token_N"].tolist()  # target genes come last
    ([6], [6, 7])
    """

    is_gene_V: Tensor
    target_fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    cell_weight: float = 1.0
    second_pass: bool = False
    second_pass_from: int | None = None
    name: str = "generative"

    def at_step(self, step: int) -> Generative:
        """Return the objective with the second pass if `step` is at least `second_pass_from`."""
        due = self.second_pass_from is not None and step >= self.second_pass_from
        return replace(self, second_pass=True) if due else self

    def corrupt(self, cells: CellBatch, generator: torch.Generator) -> tuple[CellBatch, Targets]:
        values_of(cells)
        fraction = self.target_fractions[int(torch.randint(len(self.target_fractions), (), generator=generator))]
        is_target_T = draw_targets(self.is_gene_V[cells.gene_ids_T.long()], cells, fraction, generator)
        inputs, order_T = context_first(cells, is_target_T)
        token_N = is_target_T[order_T].nonzero().squeeze(1)
        values_T = values_of(inputs)
        hidden = inputs.replace(values_T=values_T.index_fill(0, token_N, MASK_VALUE))
        return hidden, {"token_N": token_N, "values_N": values_T[token_N]}

    def loss(self, network: CellTransformer, inputs: CellBatch, targets: Targets) -> Loss:
        hidden_TD = network(inputs)
        loss = value_terms(network, hidden_TD, inputs, targets, cell_weight=self.cell_weight)
        if self.second_pass:
            loss["gep_from_cell"] = self._second_pass(
                network, network.pool(hidden_TD, inputs).detach(), inputs, targets
            )
        return loss

    def _second_pass(self, network: CellTransformer, cell_BD: Tensor, inputs: CellBatch, targets: Targets) -> Term:
        token_N = targets["token_N"]
        batch_ids_N = None if inputs.batch_ids_B is None else inputs.batch_ids_B[inputs.cell_of_token_T()[token_N]]
        state_ND = network(inputs, first_BD=cell_BD).index_select(0, token_N)
        return squared_error(network.values(state_ND, batch_ids_N), targets["values_N"])


def draw_targets(is_gene_T: Tensor, cells: CellBatch, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw `round(fraction * genes)` genes of each cell, but never all of them, shape (T,), bool."""
    cell_T = cells.cell_of_token_T()
    genes_B = torch.zeros(len(cells), dtype=torch.int64).index_add(0, cell_T, is_gene_T.long())
    wanted_B = torch.minimum((fraction * genes_B).round().long(), (genes_B - 1).clamp(min=0))
    draw_T = torch.rand(cells.n_tokens, generator=generator).double().masked_fill(~is_gene_T, 2.0)
    order_T = torch.argsort(cell_T + draw_T / 4)  # within each cell: genes in random order, then special tokens
    is_target_T = torch.zeros(cells.n_tokens, dtype=torch.bool)
    is_target_T[order_T] = cells.position_T() < wanted_B[cell_T]
    return is_target_T


def context_first(cells: CellBatch, is_target_T: Tensor) -> tuple[CellBatch, Tensor]:
    """Move target tokens behind the context tokens of their cell, in their order, and count the context tokens.

    Returns
    -------
    The reordered cells, and the previous index of each token, shape (T,).
    """
    cell_T = cells.cell_of_token_T()
    order_T = torch.argsort(2 * cell_T + is_target_T, stable=True)
    known_B = torch.zeros(len(cells), dtype=torch.int64, device=cells.device).index_add(
        0, cell_T, (~is_target_T).long()
    )
    reordered = cells.replace(
        gene_ids_T=cells.gene_ids_T[order_T], values_T=values_of(cells)[order_T], n_known=known_B.to(torch.int32)
    )
    return reordered, order_T


def _generative(network: CellTransformer, encoding: Encoding) -> Generative:
    return Generative(is_gene_V=network.is_gene_V.cpu(), second_pass_from=SECOND_PASS_STEPS)


OBJECTIVES.add(
    "generative", PretrainingObjective(make=_generative, network_settings={"heads": {"values_from_cells": True}})
)
