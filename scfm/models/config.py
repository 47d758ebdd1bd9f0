"""`ModelConfig`: every family is a setting of one network."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

Positions = Literal["none", "rank"]
Values = Literal["none", "continuous", "bucket", "soft_bins"]
Pooling = Literal["mean", "max", "cls", "concat"]
ValueHeadKind = Literal["none", "mlp", "linear", "bucket"]
ClassHeadKind = Literal["normalised", "pooler", "token", "mlp", "panel"]


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
    attention
        "softmax", or "linear": random features (FAVOR+), at a cost linear in a cell's length (scBERT).
    n_random_features
        Random features of a head; 0 for `int(d_head ln d_head)`.
    redraw_interval
        Training steps after which random features are drawn anew.
    positions
        "rank": a learned embedding of each token's place in its cell (Geneformer). "none": cells are sets.
    values
        "continuous": values pass through a small network (scGPT). "bucket": a vector a bucket (scBERT). "soft_bins": a mixture of
        vectors (scFoundation). "none": tokens are genes alone.
    n_value_bins
        Vectors of "bucket" (the last means masked) and "soft_bins".
    bin_alpha
        Weight of the direct path in "soft_bins".
    unknown_tokens
        What a token to be generated gets: its "value", or a "flag" in place of the value (scGPT's pretraining).
    skip_unknown_out
        Leave the output projection of attention out for tokens to be generated, as scGPT's published pretraining branch does.
    n_token_types
        Rows of a token-type embedding, of which only the first is used (Geneformer's BERT stores two).
    gene_norm
        Layer norm on the gene embedding alone (scGPT).
    train_gene_embedding
        False freezes the gene embedding (scBERT's gene2vec).
    embedding_norm
        Layer norm and dropout on the summed embedding (BERT).
    batch_norm, n_batches
        Batch norm on the summed embedding, "shared" or one a "domain", of `n_batches` experimental batches (scGPT).
    norm
        Where the layer norms of a block stand.
    final_norm
        Layer norm on the last block's output.
    decoder_layers, decoder_width, decoder_heads, decoder_head_width
        A Performer over all genes behind the encoder of the expressed ones (scFoundation); 0 layers for none.
    value_head, zero_head
        What predicts values: "mlp" (scGPT), "linear" (scFoundation), "bucket" (scBERT); and whether it says too if a value is 0.
    batch_labels
        Whether the value heads read the experimental batch beside the state (scGPT).
    batch_head
        A discriminator of experimental batches, for gradient reversal.
    class_head
        "normalised" (ours), "pooler" (BERT), "token" (BERT, a class a gene), "mlp" (scGPT), "panel" (scBERT).
    n_classes, n_class_layers, class_dropout
        Classes, 0 for no head; layers of "mlp" and of the discriminator; dropout in the head.
    gene_classifier
        A linear classifier of log-expression beside the class head, which votes with it.
    pooling
        How a cell's embedding is made of its token states.
    embedding_layer
        Hidden state that the cell's embedding is made of, indexed as Python does: -1 the last, 0 the input of the first block.
    normalize_embedding
        Whether cell embeddings are divided by their length (scGPT).

    Examples
    --------
    >>> import scfm
    >>> config = scfm.ModelConfig(n_tokens=1000, d_model=64, n_heads=4, n_layers=2)
    >>> config.d_head
    16
    >>> config.replace(n_layers=3).n_layers
    3
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
    attention: Literal["softmax", "linear"] = "softmax"
    n_random_features: int = 0
    redraw_interval: int = 1000
    activation: Literal["relu", "gelu", "leaky_relu"] = "relu"
    norm: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12
    dropout: float = 0.02
    dropout_in_feed_forward: bool = False
    positions: Positions = "rank"
    values: Values = "none"
    n_value_bins: int = 0
    bin_alpha: float = 1.0
    unknown_tokens: Literal["value", "flag"] = "value"
    skip_unknown_out: bool = False
    n_token_types: int = 0
    gene_norm: bool = False
    train_gene_embedding: bool = True
    embedding_norm: bool = True
    batch_norm: Literal["none", "shared", "domain"] = "none"
    n_batches: int = 0
    final_norm: bool = False
    decoder_layers: int = 0
    decoder_width: int = 512
    decoder_heads: int = 8
    decoder_head_width: int = 64
    gene_head: bool = True
    value_head: ValueHeadKind = "none"
    zero_head: bool = False
    value_from_cell_head: bool = False
    batch_labels: bool = False
    batch_head: bool = False
    class_head: ClassHeadKind = "normalised"
    gene_classifier: bool = False
    n_classes: int = 0
    n_class_layers: int = 3
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
        if self.attention == "linear" and not self.n_random_features:
            object.__setattr__(self, "n_random_features", int(self.d_head * math.log(self.d_head)))
        if self.values in ("bucket", "soft_bins") and self.n_value_bins < 2:
            raise ValueError(f"ModelConfig.n_value_bins is {self.n_value_bins}; {self.values!r} needs at least 2.")
        if self.n_batches < 1 and (self.batch_norm == "domain" or self.batch_labels or self.batch_head):
            raise ValueError(
                f"ModelConfig.n_batches is {self.n_batches}; domain batch norm, batch labels and the batch head need it."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ModelConfig.dropout is {self.dropout}; it must be in [0, 1).")
        if self.pad_id is not None and not 0 <= self.pad_id < self.n_tokens:
            raise ValueError(f"ModelConfig.pad_id is {self.pad_id}; the vocabulary has {self.n_tokens} tokens.")

    @property
    def d_head(self) -> int:
        return self.head_width or self.d_model // self.n_heads

    @property
    def d_read(self) -> int:
        """Width that scGPT's value heads read: the state, and the batch embedding where there is one."""
        return 2 * self.d_model if self.batch_labels else self.d_model

    @property
    def d_embedding(self) -> int:
        """Width of a cell's embedding as `pooling` makes it."""
        return 4 * self.d_model if self.pooling == "concat" else self.d_model

    @property
    def decoder_config(self) -> ModelConfig:
        """Settings of the decoder's blocks: a pre-norm Performer with GELU, feed-forward of four times its width."""
        return self.replace(
            d_model=self.decoder_width,
            n_heads=self.decoder_heads,
            head_width=self.decoder_head_width,
            n_layers=self.decoder_layers,
            d_ff=4 * self.decoder_width,
            qkv_bias=False,
            attention="linear",
            activation="gelu",
            norm="pre",
            norm_eps=1e-5,
            dropout=0.0,
            decoder_layers=0,
        )

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
