"""The embedding of tokens: token ids and values are mapped to the input of the first block."""

# Axes: B cells, T packed tokens, D model width.

from __future__ import annotations

import torch
from torch import Tensor, nn

from scfm.nn.batch_norm import TokenBatchNorm
from scfm.nn.config import EmbeddingConfig
from scfm.nn.dropout import dropout
from scfm.nn.values import VALUE_EMBEDDINGS

TARGET_FLAG = 1  # row of the flag embedding for target tokens; scGPT never uses row 0


class TokenEmbedding(nn.Module):
    """The sum of the embeddings of gene, rank, token type and value; which of them exist depends on the family."""

    def __init__(
        self,
        n_tokens: int,
        d_model: int,
        config: EmbeddingConfig,
        *,
        pad_id: int | None,
        context_length: int,
        n_batches: int,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.gene = nn.Embedding(n_tokens, d_model, padding_idx=pad_id)
        self.gene.weight.requires_grad_(config.train_genes)
        self.gene_norm = nn.LayerNorm(d_model) if config.gene_norm else None
        self.rank = nn.Embedding(context_length, d_model) if config.positions == "rank" else None
        self.token_type = nn.Embedding(config.n_token_types, d_model) if config.n_token_types else None
        self.value = (
            None if config.values == "none" else VALUE_EMBEDDINGS[config.values](d_model, config, dropout=dropout)
        )
        self.flag = nn.Embedding(2, d_model) if config.target_input == "flag" else None
        self.batch_norm = None
        if config.batch_norm != "none":
            self.batch_norm = TokenBatchNorm(d_model, n_domains=n_batches if config.batch_norm == "domain" else None)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps) if config.norm else None
        self.dropout = dropout if config.norm else 0.0

    def forward(
        self,
        gene_ids_T: Tensor,
        values_T: Tensor | None,
        position_T: Tensor,
        *,
        is_target_T: Tensor | None = None,
        batch_ids_T: Tensor | None = None,
    ) -> Tensor:
        """Return the input of the first block, shape (T, D).

        Parameters
        ----------
        gene_ids_T, values_T, position_T
            Token ids, values (None if the encoding has none) and positions in the cell, each of shape (T,).
        is_target_T
            Target tokens, shape (T,), bool; with a flag embedding they get the flag instead of their value.
        batch_ids_T
            Experimental batch of each token, shape (T,), for the batch norm of each experimental batch.
        """
        hidden_TD = self.genes(gene_ids_T)
        if self.token_type is not None:
            hidden_TD = hidden_TD + self.token_type.weight[0]
        if self.rank is not None:
            hidden_TD = hidden_TD + self.rank(position_T)
        if self.value is not None:
            if values_T is None:
                raise ValueError(
                    "This network embeds values, but the batch has none (`values_T` is None). Encode the cells with the "
                    "encoding of the model."
                )
            value_TD = self.value(values_T)
            if self.flag is not None and is_target_T is not None:
                value_TD = torch.where(is_target_T[:, None], self.flag.weight[TARGET_FLAG], value_TD)
            hidden_TD = hidden_TD + value_TD
        if self.batch_norm is not None:
            hidden_TD = self.batch_norm(hidden_TD, batch_ids_T)
        if self.norm is not None:
            hidden_TD = self.norm(hidden_TD)
        return dropout(hidden_TD, self.dropout, self.training)

    def genes(self, gene_ids_T: Tensor) -> Tensor:
        """Return the embeddings of genes, without rank and value, shape (T, D)."""
        hidden_TD = self.gene(gene_ids_T.long())
        return hidden_TD if self.gene_norm is None else self.gene_norm(hidden_TD)


@torch.no_grad()
def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """Initialize as BERT does: weights from a normal distribution, biases and the padding row 0."""
    if isinstance(module, nn.Linear):
        module.weight.normal_(0.0, std)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(0.0, std)
        if module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
