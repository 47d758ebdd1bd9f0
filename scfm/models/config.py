"""`ModelConfig`: every family is a setting of one network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Positions = Literal["none", "rank"]
Values = Literal["none", "continuous"]
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and wiring of the network; JSON-able, saved with every model.

    Attributes
    ----------
    n_tokens
        Rows of the gene embedding: the length of the vocabulary.
    pad_id
        Row of the gene embedding that stays zero; None where the vocabulary has no padding token.
    context_length
        Most tokens a cell may have; the length of the rank embedding where there is one.
    d_model, n_heads, n_layers, d_ff
        Width, attention heads, blocks, width of the feed-forward.
    head_width
        Width of one head; None for `d_model / n_heads`.
    positions
        "rank": a learned embedding of each token's place in its cell (Geneformer). "none": cells are sets.
    values
        "continuous": values pass through a small network (scGPT). "none": tokens are genes alone.
    n_token_types
        Rows of a token-type embedding, of which only the first is used (Geneformer's BERT stores two).
    gene_norm
        Layer norm on the gene embedding alone (scGPT).
    embedding_norm
        Layer norm and dropout on the summed embedding (BERT).
    norm
        Where the layer norms of a block stand.
    pooling
        How a cell's embedding is made of its token states.
    embedding_layer
        Hidden state that the cell's embedding is made of, indexed as Python does: -1 the last, 0 the input of the first block.
    normalize_embedding
        Whether cell embeddings are divided by their length (scGPT).
    """

    n_tokens: int
    pad_id: int | None = 0
    context_length: int = 2048
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 4
    d_ff: int = 256
    head_width: int | None = None
    qkv_bias: bool = True
    activation: Literal["relu", "gelu", "leaky_relu"] = "relu"
    norm: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12
    dropout: float = 0.02
    dropout_in_feed_forward: bool = False
    positions: Positions = "rank"
    values: Values = "none"
    n_token_types: int = 0
    gene_norm: bool = False
    embedding_norm: bool = True
    final_norm: bool = False
    gene_head: bool = True
    value_head: bool = False
    value_from_cell_head: bool = False
    n_classes: int = 0
    class_dropout: float = 0.0
    pooling: Pooling = "mean"
    embedding_layer: int = -1
    normalize_embedding: bool = False

    def __post_init__(self) -> None:
        for name in ("n_tokens", "context_length", "d_model", "n_heads", "n_layers", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.head_width is None and self.d_model % self.n_heads:
            raise ValueError(
                f"ModelConfig.d_model is {self.d_model}, which {self.n_heads} heads do not divide. "
                "Change one of them, or set `head_width`."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ModelConfig.dropout is {self.dropout}; it must be in [0, 1).")
        if self.pad_id is not None and not 0 <= self.pad_id < self.n_tokens:
            raise ValueError(f"ModelConfig.pad_id is {self.pad_id}; the vocabulary has {self.n_tokens} tokens.")

    @property
    def d_head(self) -> int:
        return self.head_width or self.d_model // self.n_heads

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from `to_dict`'s output; an unknown field is an error, never dropped."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"ModelConfig has no field {', '.join(unknown)}. A newer scfm may have written this file.")
        return cls(**values)
