"""The one network behind every family: embedding, blocks, heads, on packed cells."""

# Axes: B cells, T packed tokens, N chosen tokens, D model width, V tokens of the vocabulary, C classes.

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from scfm import ops
from scfm.data.batch import CellBatch
from scfm.models.config import ModelConfig
from scfm.nn import Attention, Block, ClassHead, GeneHead, TokenEmbedding, ValueFromCellHead, ValueHead, pool_cells
from scfm.nn.embedding import init_weights
from scfm.ops.attention import Backend
from scfm.vocab import Vocabulary


class CellTransformer(nn.Module):
    """Transformer over the expressed genes of a cell.

    Cells travel packed end to end, so padding is never computed. The state of a token depends on its own cell only.

    Parameters
    ----------
    config
        Shape and wiring; `scfm.models.presets` has those of the published families.
    special_ids
        Token ids that are not genes (padding, mask, cls, eos); they are left out of mean pooling.
    """

    is_gene_V: Tensor

    def __init__(self, config: ModelConfig, special_ids: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.gene_head = GeneHead(config) if config.gene_head else None
        self.value_head = ValueHead(config) if config.value_head else None
        self.value_from_cell_head = ValueFromCellHead(config) if config.value_from_cell_head else None
        self.class_head = ClassHead(config, config.n_classes) if config.n_classes else None
        is_gene_V = torch.ones(config.n_tokens, dtype=torch.bool)
        is_gene_V[list(special_ids)] = False
        self.register_buffer("is_gene_V", is_gene_V, persistent=False)
        self.apply(init_weights)

    @classmethod
    def for_vocabulary(cls, config: ModelConfig, vocabulary: Vocabulary) -> CellTransformer:
        """Build the network that reads the tokens of `vocabulary`."""
        genes = set(vocabulary.gene_ids.tolist())
        return cls(config, tuple(token for token in range(len(vocabulary)) if token not in genes))

    def forward(self, cells: CellBatch, *, hidden_layer: int = -1) -> Tensor:
        """States of all tokens after one layer, shape (T, D).

        `hidden_layer` indexes [input of the first block, output of block 1, ..., output of the last block] as Python
        does. Blocks after the one asked for are not computed.
        """
        n_states = self.config.n_layers + 1
        if not -n_states <= hidden_layer < n_states:
            raise IndexError(
                f"`hidden_layer` is {hidden_layer}; a network of {self.config.n_layers} blocks has the hidden states "
                f"{-n_states} to {n_states - 1}."
            )
        return next(islice(self.hidden_states(cells), hidden_layer % n_states, None))

    def hidden_states(self, cells: CellBatch) -> Iterator[Tensor]:
        """Yield the input of the first block, then the output of each, every one of shape (T, D)."""
        plan = self.plan(cells)
        hidden_TD = self.embedding(cells.gene_ids_T, cells.values_T, cells.position_T())
        yield hidden_TD
        for block in self.blocks:
            hidden_TD = block(hidden_TD, plan)
            yield self.norm(hidden_TD) if block is self.blocks[-1] else hidden_TD

    def plan(self, cells: CellBatch) -> ops.AttentionPlan:
        """Lay out the attention of a batch once, for all layers."""
        return ops.make_plan(cells.cu_seqlens, n_known=cells.n_known)

    def set_attention_backend(self, backend: Backend) -> None:
        """Force the attention kernel of every block: "auto", "fused" or "torch"."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def embed_cells(self, cells: CellBatch, *, hidden_layer: int | None = None, pooling: str | None = None) -> Tensor:
        """One vector a cell, shape (B, D), as the configuration says unless told otherwise."""
        layer = self.config.embedding_layer if hidden_layer is None else hidden_layer
        return self.pool(self(cells, hidden_layer=layer), cells, pooling)

    def pool(self, hidden_TD: Tensor, cells: CellBatch, pooling: str | None = None) -> Tensor:
        """Pool token states to cells; the mean leaves special tokens out."""
        how = self.config.pooling if pooling is None else pooling
        keep_T = self.is_gene_V[cells.gene_ids_T.long()] if how != "cls" else None
        return pool_cells(hidden_TD, cells.cu_seqlens, keep_T, how=how)

    def gene_logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits of the gene at each chosen token, shape (N, V); the decoder is the gene embedding."""
        return self._head("gene_head")(hidden_ND, self.embedding.gene.weight)

    def values(self, hidden_ND: Tensor) -> Tensor:
        """Value at each chosen token, shape (N,)."""
        return self._head("value_head")(hidden_ND)

    def values_from_cells(self, cell_ND: Tensor, gene_ids_N: Tensor) -> Tensor:
        """Value of each chosen gene from the embedding of its cell, shape (N,)."""
        return self._head("value_from_cell_head")(cell_ND, self.embedding.genes(gene_ids_N))

    def class_logits(self, cells: CellBatch) -> Tensor:
        """Logits of each cell's class, shape (B, C)."""
        return self._head("class_head")(self.embed_cells(cells, hidden_layer=-1))

    def add_class_head(self, n_classes: int) -> None:
        """Put a fresh classification head on the network, replacing one that is there."""
        self.config = self.config.replace(n_classes=n_classes)
        self.class_head = ClassHead(self.config, n_classes).to(self.embedding.gene.weight.device)
        self.class_head.apply(init_weights)

    def _head(self, name: str) -> nn.Module:
        head = getattr(self, name)
        if head is None:
            raise ValueError(f"This network has no {name.replace('_', ' ')}; set it in its ModelConfig.")
        return head
