"""`CellTransformer`: the network of all model families, with embedding, blocks and heads on packed cells."""

# Axes: B cells, T packed tokens, N chosen tokens, D model width, V tokens of the vocabulary, C classes, S value buckets.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from scfm import ops
from scfm.data.batch import CellBatch
from scfm.models.config import ModelConfig
from scfm.models.decoder import Decoder
from scfm.nn import (
    Attention,
    BatchLabels,
    Block,
    ClassGaussians,
    GeneClassifier,
    GeneHead,
    TokenEmbedding,
    ValueFromCellHead,
    expression_weights,
    pool_cells,
)
from scfm.nn.block import target_tokens
from scfm.nn.class_heads import MLPClassHead, make_class_head
from scfm.nn.embedding import init_weights
from scfm.nn.heads import BucketHead, LinearValueHead, ValueHead
from scfm.nn.recording import Recording, record
from scfm.ops.attention import Backend
from scfm.vocab import Vocabulary


@dataclass(frozen=True)
class Readout:
    """Settings for computing one vector per cell from the states of its tokens.

    Attributes
    ----------
    n_blocks
        Number of blocks to apply; 0 for the input of the first block.
    pooling
        Argument `how` of `scfm.nn.pool_cells`.
    """

    n_blocks: int
    pooling: str


class CellTransformer(nn.Module):
    """Transformer over the tokens of a cell.

    Cells are packed end to end, without padding. The state of a token depends only on tokens of the same cell.

    Parameters
    ----------
    config
        Settings; `scfm.families` has those of the published families.
    special_ids
        Token ids that are not genes (padding, mask, cls, eos); mean pooling ignores them.

    Examples
    --------
    >>> import torch, scfm
    >>> network = scfm.models.CellTransformer(scfm.ModelConfig(n_tokens=100, d_model=32, n_heads=2, n_layers=1))
    >>> ids = torch.arange(4, 10, dtype=torch.int32)
    >>> cells = scfm.CellBatch(gene_ids_T=ids, cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32))
    >>> network(cells).shape, network.embed_cells(cells).shape
    (torch.Size([6, 32]), torch.Size([2, 32]))
    """

    is_gene_V: Tensor
    calls_since_redraw: Tensor
    class_head: Any  # None, or a head of the kind in the configuration

    def __init__(self, config: ModelConfig, special_ids: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(
            config.n_tokens,
            config.d_model,
            config.embedding,
            pad_id=config.pad_id,
            context_length=config.context_length,
            n_batches=config.n_batches,
            dropout=config.dropout,
            norm_eps=config.norm_eps,
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.decoder = None if config.decoder is None else Decoder(config.d_model, config.decoder)
        self._add_pretraining_heads()
        self._add_classes()
        is_gene_V = torch.ones(config.n_tokens, dtype=torch.bool)
        is_gene_V[list(special_ids)] = False
        self.register_buffer("is_gene_V", is_gene_V, persistent=False)
        if config.redraw_interval is not None:
            self.register_buffer("calls_since_redraw", torch.tensor(0))
        self.apply(init_weights)

    def _add_pretraining_heads(self) -> None:
        config, heads = self.config, self.config.heads
        d_model, d_input = config.d_model, config.d_value_input
        self.gene_head = GeneHead(d_model, config.n_tokens, norm_eps=config.norm_eps) if heads.genes else None
        self.value_head = _value_head(config)
        self.value_from_cell_head = (
            ValueFromCellHead(d_model, d_input, zeros=heads.zeros) if heads.values_from_cells else None
        )
        self.batch_labels = BatchLabels(config.n_batches, d_model) if heads.batch_labels else None
        self.batch_head = (
            MLPClassHead(d_model, config.n_batches, config.classes.n_layers, nn.LeakyReLU) if heads.batches else None
        )

    def _add_classes(self) -> None:
        config, classes = self.config, self.config.classes
        self.class_head = None
        if classes.n_classes:
            widths = {"d_model": config.d_model, "d_embedding": config.d_embedding}
            self.class_head = make_class_head(classes, **widths, context_length=config.context_length)
        self.gene_classifier = GeneClassifier(config.n_tokens, classes.n_classes) if classes.gene_classifier else None
        self.novelty = None
        if classes.n_novelty_components:
            self.novelty = ClassGaussians(config.n_tokens, classes.n_classes, classes.n_novelty_components)

    @classmethod
    def for_vocabulary(cls, config: ModelConfig, vocabulary: Vocabulary) -> CellTransformer:
        """Build a network for the tokens of `vocabulary`."""
        if config.n_tokens != len(vocabulary):
            raise ValueError(
                f"ModelConfig.n_tokens is {config.n_tokens}, but the vocabulary has {len(vocabulary)} tokens."
            )
        genes = set(vocabulary.gene_ids.tolist())
        return cls(config, tuple(token for token in range(len(vocabulary)) if token not in genes))

    def forward(self, cells: CellBatch, *, hidden_layer: int = -1, first_BD: Tensor | None = None) -> Tensor:
        """Return the states of all tokens at one layer, shape (T, D).

        `hidden_layer` is an index of the list [input of the first block, output of block 1, ..., output of the last block].
        Later blocks are not computed. `first_BD` replaces the input of each cell's first token.
        """
        n_states = self.config.n_layers + 1
        if not isinstance(hidden_layer, int) or not -n_states <= hidden_layer < n_states:
            raise IndexError(
                f"`hidden_layer` is {hidden_layer}; a network of {self.config.n_layers} blocks has the hidden states "
                f"{-n_states} to {n_states - 1}."
            )
        return next(islice(self.hidden_states(cells, first_BD), hidden_layer % n_states, None))

    def hidden_states(self, cells: CellBatch, first_BD: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the input of the first block, then the output of each block, all of shape (T, D)."""
        self._redraw_when_due()
        plan = self.plan(cells)
        hidden_TD = self.embed_tokens(cells, plan)
        if first_BD is not None:
            hidden_TD = hidden_TD.index_copy(0, cells.cu_seqlens[:-1].long(), first_BD.to(hidden_TD.dtype))
        # The embedding may have a higher precision than the blocks, because bfloat16 would round values too much.
        hidden_TD = hidden_TD.to(self.blocks[0].dtype)  # type: ignore[arg-type]
        yield hidden_TD
        for block in self.blocks:
            hidden_TD = block(hidden_TD, plan)
            yield self.norm(hidden_TD) if block is self.blocks[-1] else hidden_TD

    def states_at(self, cells: CellBatch, token_N: Tensor, plan: ops.AttentionPlan | None = None) -> Tensor:
        """Return states of the last block at the ascending token indices `token_N`, shape (N, D).

        The result equals `network(cells)[token_N]`, but the last block is computed for these tokens only. `plan` is
        `cells.plan_of_queries(token_N)`, if it was made ahead.
        """
        if cells.n_known is not None:
            return self(cells).index_select(0, token_N)
        hidden_TD = self(cells, hidden_layer=-2)
        plan = (plan or cells.plan_of_queries(token_N)).to(cells.device)
        return self.norm(self.blocks[-1](hidden_TD, plan, token_N))

    def embed_tokens(self, cells: CellBatch, plan: ops.AttentionPlan) -> Tensor:
        """Return the input of the first block, shape (T, D)."""
        is_target_T = None if plan.n_known is None else target_tokens(plan, cells.device)
        batch_ids_T = None if cells.batch_ids_B is None else cells.batch_ids_B[cells.cell_of_token_T()]
        return self.embedding(
            cells.gene_ids_T, cells.values_T, cells.position_T(), is_target_T=is_target_T, batch_ids_T=batch_ids_T
        )

    def input_states(self, cells: CellBatch) -> Tensor:
        """Return the input of the first block in the precision of the block, shape (T, D)."""
        return self.embed_tokens(cells, self.plan(cells)).to(self.blocks[0].dtype)  # type: ignore[arg-type]

    @property
    def embedding_readout(self) -> Readout:
        """Readout for the embedding of a cell."""
        return Readout(self.config.pooling.hidden_layer % (self.config.n_layers + 1), self.config.pooling.how)

    @property
    def class_readout(self) -> Readout:
        """Readout for the class head."""
        return self.embedding_readout if self.class_head_reads_embedding else Readout(self.config.n_layers, "cls")

    def states_for(self, readout: Readout, cells: CellBatch) -> Tensor:
        """Return the token states that a readout pools, shape (T, D)."""
        return self(cells, hidden_layer=readout.n_blocks)

    def read_out(self, readout: Readout, cells: CellBatch) -> Tensor:
        """Return one vector per cell, shape (B, D)."""
        return self.pool(self.states_for(readout, cells), cells, readout.pooling)

    def read_out_from(self, readout: Readout, hidden_TD: Tensor, cells: CellBatch, *, n_done: int) -> Tensor:
        """Return the same as `read_out`, from token states after the first `n_done` blocks."""
        plan = self.plan(cells)
        for block in self.blocks[n_done : readout.n_blocks]:
            hidden_TD = block(hidden_TD, plan)
        return self.pool(self._normed(hidden_TD, readout), cells, readout.pooling)

    def states_with_keys(self, readout: Readout, cells: CellBatch, keys: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the token states that a readout pools, shape (T, D), if tokens attend to the given keys and values.

        `keys` holds keys and values for each block of the readout, each of shape (T, H, K), instead of those of `cells`.
        """
        hidden_TD, plan = self.input_states(cells), self.plan(cells)
        for block, (key_THK, value_THK) in zip(self.blocks[: readout.n_blocks], keys):
            hidden_TD = block.with_keys(hidden_TD, key_THK, value_THK, plan)  # type: ignore[operator]
        return self._normed(hidden_TD, readout)

    def _normed(self, hidden_TD: Tensor, readout: Readout) -> Tensor:
        return self.norm(hidden_TD) if readout.n_blocks == self.config.n_layers else hidden_TD

    def record(self) -> AbstractContextManager[Recording]:
        """Record queries, keys, values and rank embeddings of the forward passes within a `with` statement."""
        return record(self.blocks, self.embedding.rank)

    def plan(self, cells: CellBatch) -> ops.AttentionPlan:
        """Return the attention plan of a batch, which all layers share; a plan that came with the batch is taken."""
        plan = cells.plan or ops.make_plan(cells.cu_seqlens, n_known=cells.n_known)
        return plan.to(cells.device)

    def set_attention_backend(self, backend: Backend) -> None:
        """Set the attention backend of every block: "auto", "fused" or "torch"."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def value_states(self, cells: CellBatch) -> Tensor:
        """Return the input of the value head, shape (T, D): states of the last block, or of the decoder if there is one.

        With a decoder, the input of the encoder is the tokens with a value above 0, and that of the decoder all tokens.
        """
        if self.decoder is None:
            return self(cells)
        if cells.values_T is None:
            raise ValueError(
                "This network embeds values, but the batch has none (`values_T` is None). Encode the cells with the encoding "
                "of the model."
            )
        visible_T = cells.values_T > 0
        encoded_ND = self(cells.select_tokens(visible_T))
        hidden_TD = self.embedding.value(cells.values_T)  # type: ignore[misc]
        hidden_TD = hidden_TD.index_copy(0, visible_T.nonzero().squeeze(1), encoded_ND.to(hidden_TD.dtype))
        return self.decoder(hidden_TD + self.embedding.genes(cells.gene_ids_T), self.plan(cells))

    def embed_cells(self, cells: CellBatch, *, hidden_layer: int | None = None, pooling: str | None = None) -> Tensor:
        """Return one vector per cell, shape (B, D). None for the settings of the configuration."""
        layer = self.config.pooling.hidden_layer if hidden_layer is None else hidden_layer
        return self.pool(self(cells, hidden_layer=layer), cells, pooling)

    def pool(self, hidden_TD: Tensor, cells: CellBatch, pooling: str | None = None) -> Tensor:
        """Pool token states to one vector per cell; means ignore special tokens."""
        how = self.config.pooling.how if pooling is None else pooling
        keep_T = self.is_gene_T(cells) if how not in ("cls", "weighted") else None
        weight_T = self.pooling_weights(cells, how) if how == "weighted" else None
        return pool_cells(hidden_TD, cells.cu_seqlens, keep_T, how=how, weight_T=weight_T)

    def pooling_weights(self, cells: CellBatch, how: str) -> Tensor:
        """Return the weight of each token for "mean" or "weighted" pooling, shape (T,), float32; 0 for special tokens."""
        is_gene_T = self.is_gene_T(cells).float()
        return is_gene_T * expression_weights(cells.position_T(), cells.values_T) if how == "weighted" else is_gene_T

    def is_gene_T(self, cells: CellBatch) -> Tensor:
        """Return whether each token is a gene, shape (T,), bool."""
        return self.is_gene_V[cells.gene_ids_T.long()]

    def gene_logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits over genes for each chosen token, shape (N, V); the decoder is the gene embedding."""
        return self._head("gene_head")(hidden_ND, self.embedding.gene.weight)

    def values(self, hidden_ND: Tensor, batch_ids_N: Tensor | None = None) -> Tensor:
        """Return the value of each chosen token, shape (N,); with a bucket head logits over buckets, shape (N, S)."""
        return self._head("value_head")(self.with_batch(hidden_ND, batch_ids_N))

    def values_from_cells(self, cell_ND: Tensor, gene_ids_N: Tensor, batch_ids_N: Tensor | None = None) -> Tensor:
        """Return the value of each chosen gene, predicted from the embedding of its cell, shape (N,)."""
        genes_ND = self.embedding.genes(gene_ids_N)
        cell_ND = cell_ND.to(genes_ND.dtype)  # a mean over tokens is float32, also of a bfloat16 network
        return self._head("value_from_cell_head")(self.with_batch(cell_ND, batch_ids_N), genes_ND)

    def with_batch(self, hidden_ND: Tensor, batch_ids_N: Tensor | None) -> Tensor:
        """Append the embedding of the experimental batch to each row if the value heads need it."""
        if self.batch_labels is None:
            return hidden_ND
        if batch_ids_N is None:
            raise ValueError("The value heads of this network need the experimental batch. Pass `batch_ids_B`.")
        return torch.cat([hidden_ND, self.batch_labels(batch_ids_N).to(hidden_ND.dtype)], -1)

    def class_logits(self, cells: CellBatch) -> Tensor:
        """Return class logits of each cell, shape (B, C), or, with a "token" head, of each token, shape (T, C)."""
        head, kind = self._head("class_head"), self.config.classes.kind
        if kind in ("token", "panel"):
            return head(self(cells))
        return head(self.class_features(cells))

    def class_features(self, cells: CellBatch) -> Tensor:
        """Return the input of the class head: the embedding of each cell, or the state of its first token."""
        return self.read_out(self.class_readout, cells)

    @property
    def class_head_reads_embedding(self) -> bool:
        """Whether class features are the cell embedding; heads of BERT and scGPT use the last state of the first token."""
        return self.config.classes.kind not in ("pooler", "mlp")

    def add_class_head(self, n_classes: int, *, kind: str = "batch_norm", gene_classifier: bool = True) -> None:
        """Replace the class head by a new one, by default one that reads the cell embedding, and the gene classifier too."""
        classes = {"kind": kind, "n_classes": n_classes, "gene_classifier": gene_classifier, "n_novelty_components": 0}
        self.config = self.config.replace(classes=classes)
        self._add_classes()
        for module in (self.class_head, self.gene_classifier):
            if module is not None:
                module.to(self.embedding.gene.weight.device)
        self.class_head.apply(init_weights)

    def add_gene_classifier(self) -> None:
        """Replace the linear classifier of gene expression by a new one for the same classes."""
        self.config = self.config.replace(classes={"gene_classifier": True})
        classifier = GeneClassifier(self.config.n_tokens, self.config.classes.n_classes)
        self.gene_classifier = classifier.to(self.embedding.gene.weight.device)

    def add_novelty(self, n_components: int) -> None:
        """Replace the Gaussians of the classes by new ones."""
        self.config = self.config.replace(classes={"n_novelty_components": n_components})
        gaussians = ClassGaussians(self.config.n_tokens, self.config.classes.n_classes, n_components)
        self.novelty = gaussians.to(self.embedding.gene.weight.device)

    def remove_class_head(self) -> None:
        """Take the classification head, the gene classifier and the novelty score off the network, if it has them."""
        none = {"n_classes": 0, "gene_classifier": False, "n_novelty_components": 0}
        self.config = self.config.replace(classes=none)
        self.class_head = self.gene_classifier = self.novelty = None

    def train(self, mode: bool = True) -> CellTransformer:
        """Set training mode; batch norm statistics of frozen parts are not updated."""
        super().train(mode)
        if self.embedding.batch_norm is not None and self._has_frozen_embedding():
            self.embedding.batch_norm.eval()
        return self

    def _has_frozen_embedding(self) -> bool:
        """Whether only a part of the network is trained; statistics and random features of its blocks are then fixed."""
        return not any(parameter.requires_grad for parameter in self.embedding.parameters())

    def _head(self, name: str) -> nn.Module:
        head = getattr(self, name)
        if head is None:
            raise ValueError(f"This network has no {name.replace('_', ' ')}. Set it in `ModelConfig.heads`.")
        return head

    def _redraw_when_due(self) -> None:
        """Count training steps, and resample the random features after every `redraw_interval` steps (Performer)."""
        linear = [
            module for module in self.modules() if isinstance(module, Attention) and module.projection_MK is not None
        ]
        if not self.training or not linear or self._has_frozen_embedding():
            return
        self.calls_since_redraw += 1
        if int(self.calls_since_redraw) > (self.config.redraw_interval or 0):
            self.calls_since_redraw.zero_()
            for attention in linear:
                attention.redraw_projection()


def _value_head(config: ModelConfig) -> nn.Module | None:
    match config.heads.values:
        case "mlp":
            return ValueHead(config.d_value_input, config.d_model, zeros=config.heads.zeros)
        case "linear":
            return LinearValueHead(config.d_model if config.decoder is None else config.decoder.d_model)
        case "bucket":
            return BucketHead(config.d_model, config.embedding.n_value_bins)
        case _:
            return None
