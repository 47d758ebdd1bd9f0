"""Loss terms that several objectives share: values predicted from token states and from cell embeddings."""

# Axes: B cells, N target tokens, D model width.

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.objectives.base import Loss, Targets, Term, count_of


def value_terms(
    network: CellTransformer,
    hidden_TD: Tensor,
    inputs: CellBatch,
    targets: Targets,
    *,
    cell_weight: float = 0.0,
    zero_weight: float = 0.0,
) -> Loss:
    """Return the loss terms of the values of target tokens.

    GEP (gene expression prediction) is sum (pred - value)^2 / N with values predicted from token states. `cell_weight` adds
    MVC (masked value prediction for cell modeling), the same error for pred = (W sigmoid(A e_gene + a)) . h_cell.
    `zero_weight` adds, for each of them, the Bernoulli negative log-likelihood of "value > 0".

    Parameters
    ----------
    hidden_TD
        Token states of `inputs`, shape (T, D).
    targets
        "token_N", indices of the targets, and "values_N", their values.

    Notes
    -----
    scGPT (Cui et al. 2024).
    """
    token_N, values_N = targets["token_N"], targets["values_N"]
    cell_N = inputs.cell_of_token_T()[token_N]
    batch_ids_N = None if inputs.batch_ids_B is None else inputs.batch_ids_B[cell_N]
    # Not by `[...]`, whose gradient is summed in no fixed order with several threads.
    state_ND = hidden_TD.index_select(0, token_N)
    loss = {"gep": squared_error(network.values(state_ND, batch_ids_N), values_N)}
    if zero_weight:
        logits_N = network.value_head.nonzero(network.with_batch(state_ND, batch_ids_N))  # type: ignore[union-attr,operator]
        loss["gep_zero"] = _zero_term(logits_N, values_N, zero_weight)
    if cell_weight:
        cell_ND = network.pool(hidden_TD, inputs).index_select(0, cell_N)
        gene_ids_N = inputs.gene_ids_T[token_N]
        loss["mvc"] = squared_error(network.values_from_cells(cell_ND, gene_ids_N, batch_ids_N), values_N, cell_weight)
        if zero_weight:
            cell_ND = network.with_batch(cell_ND, batch_ids_N)
            genes_ND = network.embedding.genes(gene_ids_N)
            logits_N = network.value_from_cell_head.nonzero_logits(cell_ND, genes_ND)  # type: ignore[union-attr]
            loss["mvc_zero"] = _zero_term(logits_N, values_N, zero_weight * cell_weight)
    return loss


def squared_error(predicted_N: Tensor, values_N: Tensor, weight: float = 1.0) -> Term:
    """Return the sum of squared errors over all targets as a loss term."""
    return Term(F.mse_loss(predicted_N.float(), values_N, reduction="sum"), count_of(values_N), weight)


def _zero_term(nonzero_logits_N: Tensor, values_N: Tensor, weight: float) -> Term:
    nonzero_N = (values_N > 0).float()
    likelihood = F.binary_cross_entropy_with_logits(nonzero_logits_N.float(), nonzero_N, reduction="sum")
    return Term(likelihood, count_of(values_N), weight)
