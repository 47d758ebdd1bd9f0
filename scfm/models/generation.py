"""Stepwise generation of the values of genes from a prompt of genes with known values (scGPT)."""

# Axes: B cells, T tokens of the prompts, G genes to generate (all cells end to end), D model width.

from __future__ import annotations

import torch
from torch import Tensor

from scfm.data.batch import CellBatch
from scfm.models.network import CellTransformer
from scfm.nn.values import MASK_VALUE


@torch.no_grad()
def generate(network: CellTransformer, prompt: CellBatch, wanted: CellBatch, *, n_steps: int = 1) -> Tensor:
    """Generate the values of genes in several steps; values of earlier steps are part of the context of later ones.

    Parameters
    ----------
    network
        A network that was trained with `scfm.objectives.Generative`.
    prompt
        Context tokens of each cell with their values, including special tokens.
    wanted
        Genes to generate in each cell; their values are ignored.
    n_steps
        Number of steps. Each step generates the same number of genes, those with the least uncertainty first.

    Returns
    -------
    Values of `wanted`, shape (G,), float32, at least 0.

    Notes
    -----
    scGPT (Cui et al. 2024) generates the genes with the highest confidence first, but does not define confidence. Here the
    uncertainty of a gene is the difference between its value predicted from the token state and its value predicted from
    the cell embedding. Without the second head, genes are generated in the order of `wanted`.

    Examples
    --------
    >>> import scfm
    >>> adata = scfm.datasets.pbmc()[:50].copy()
    >>> model = scfm.fit(
    ...     adata, encoding="bin", objective="generative", context_length=64,
    ...     config=scfm.FitConfig(n_steps=2, tokens_per_step=512), progress=False,
    ... )
    >>> cells = scfm.pp.encode(adata[:2], model)
    >>> known_T = cells.position_T() < 40
    >>> prompt, wanted = cells.select_tokens(known_T), cells.select_tokens(~known_T)
    >>> scfm.models.generate(model.network, prompt, wanted, n_steps=2).shape
    torch.Size([48])
    """
    if len(prompt) != len(wanted):
        raise ValueError(f"`prompt` has {len(prompt)} cells and `wanted` {len(wanted)}; pass the same cells in both.")
    if n_steps < 1:
        raise ValueError(f"`n_steps` is {n_steps}; it must be at least 1.")
    if prompt.values_T is None:
        raise ValueError("`prompt` has no values; encode it with the bin encoding.")
    was_training = network.training
    network.eval()
    values_G = torch.full((wanted.n_tokens,), MASK_VALUE, device=prompt.device)
    known_G = torch.zeros(wanted.n_tokens, dtype=torch.bool, device=prompt.device)
    for step in range(n_steps):
        inputs, index_G = _join(prompt, wanted, values_G, known_G)
        predicted_G, uncertainty_G = _predict(network, inputs, wanted, index_G)
        values_G = torch.where(known_G, values_G, predicted_G)
        known_G = known_G | _least_uncertain(
            uncertainty_G.masked_fill(known_G, -torch.inf), wanted, (step + 1) / n_steps
        )
    network.train(was_training)
    return values_G


def _join(prompt: CellBatch, wanted: CellBatch, values_G: Tensor, known_G: Tensor) -> tuple[CellBatch, Tensor]:
    """Return cells with the prompt, generated and remaining genes; and the index of each wanted gene, shape (G,)."""
    assert prompt.values_T is not None
    n_prompt = prompt.n_tokens
    cell = torch.cat([prompt.cell_of_token_T(), wanted.cell_of_token_T()])
    part = torch.cat([torch.zeros_like(prompt.gene_ids_T), 2 - known_G.int()])
    order = torch.argsort(3 * cell + part, stable=True)
    index = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    known_B = prompt.lengths_B.long().index_add(0, wanted.cell_of_token_T(), known_G.long())
    joined = prompt.replace(
        gene_ids_T=torch.cat([prompt.gene_ids_T, wanted.gene_ids_T])[order],
        values_T=torch.cat([prompt.values_T, values_G.masked_fill(~known_G, MASK_VALUE)])[order],
        cu_seqlens=prompt.cu_seqlens + wanted.cu_seqlens,
        n_known=known_B.to(torch.int32),
    )
    return joined, index[n_prompt:]


def _predict(network: CellTransformer, inputs: CellBatch, wanted: CellBatch, index_G: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted values of the wanted genes, and their uncertainties, each of shape (G,)."""
    hidden_TD = network(inputs)
    cell_G = wanted.cell_of_token_T()
    batch_ids_G = None if inputs.batch_ids_B is None else inputs.batch_ids_B[cell_G]
    predicted_G = network.values(hidden_TD[index_G], batch_ids_G).float().clamp(min=0)
    if network.value_from_cell_head is None:
        return predicted_G, wanted.position_T().float()
    cell_GD = network.pool(hidden_TD, inputs)[cell_G].to(hidden_TD.dtype)
    return predicted_G, (network.values_from_cells(cell_GD, wanted.gene_ids_T, batch_ids_G) - predicted_G).abs()


def _least_uncertain(uncertainty_G: Tensor, wanted: CellBatch, fraction: float) -> Tensor:
    """Return whether each gene is among the fraction `fraction` of its cell with the least uncertainty, shape (G,), bool."""
    by_uncertainty = torch.argsort(uncertainty_G, stable=True)
    order = by_uncertainty[torch.argsort(wanted.cell_of_token_T()[by_uncertainty], stable=True)]
    n_due_B = (fraction * wanted.lengths_B).ceil().long()
    marked_G = torch.zeros_like(uncertainty_G, dtype=torch.bool)
    marked_G[order] = wanted.position_T() < n_due_B[wanted.cell_of_token_T()]
    return marked_G
