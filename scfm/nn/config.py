"""Settings of a network, with one configuration class for each of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from scfm._config import Config


def require_between(config: Config, name: str, smallest: int, largest: int) -> None:
    """Raise `ValueError` unless a field is in a range, so that invalid sizes are refused before a network is built."""
    value = getattr(config, name)
    if not smallest <= value <= largest:
        limit = f"at least {smallest}" if value < smallest else f"at most {largest:,}"
        raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be {limit}.")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Config):
    """Settings of self-attention.

    Attributes
    ----------
    kind
        "softmax", or "linear": random features (FAVOR+), at a cost linear in a cell's length (scBERT).
    head_width
        Width of one head; None for `d_model / n_heads`.
    qkv_bias
        Whether the projection to queries, keys and values has a bias.
    n_random_features
        Random features of a head; 0 for `int(d_head ln d_head)`.
    redraw_interval
        Number of training steps after which random features are resampled.
    skip_target_projection
        Whether target tokens skip the output projection, as in the published pretraining of scGPT.
    """

    kind: Literal["softmax", "linear"] = "softmax"
    head_width: int | None = None
    qkv_bias: bool = True
    n_random_features: int = 0
    redraw_interval: int = 1000
    skip_target_projection: bool = False

    def __post_init__(self) -> None:
        require_between(self, "n_random_features", 0, 100_000)
        require_between(self, "redraw_interval", 1, 10**12)
        if self.head_width is not None:
            require_between(self, "head_width", 1, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """Settings of a transformer block.

    Attributes
    ----------
    d_model, n_heads, d_ff
        Model width, number of attention heads, width of the feed-forward layer.
    dropout, dropout_in_feed_forward
        Dropout probability, and whether dropout is also applied within the feed-forward layer.
    activation, norm, norm_eps
        Activation of the feed-forward layer; position of the layer norms ("pre" or "post") and their epsilon.
    attention
        Settings of the attention.
    """

    d_model: int = 128
    n_heads: int = 4
    d_ff: int = 256
    dropout: float = 0.02
    dropout_in_feed_forward: bool = False
    activation: Literal["relu", "gelu", "leaky_relu"] = "relu"
    norm: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_ff"):
            require_between(self, name, 1, 1_000_000)
        if self.attention.head_width is None and self.d_model % self.n_heads:
            raise ValueError(
                f"{type(self).__name__}.d_model is {self.d_model}, which is not a multiple of n_heads ({self.n_heads}). "
                "Change one of them, or set `attention.head_width`."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{type(self).__name__}.dropout is {self.dropout}; it must be in [0, 1).")
        if self.attention.kind == "linear" and not self.attention.n_random_features:
            n_features = max(1, int(self.d_head * math.log(self.d_head)))
            object.__setattr__(self, "attention", self.attention.replace(n_random_features=n_features))

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.attention.head_width or self.d_model // self.n_heads


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """Settings of a decoder: a Performer over all genes that follows the encoder of the expressed genes (scFoundation)."""

    n_layers: int = 6
    d_model: int = 512
    n_heads: int = 8
    d_ff: int = 2048
    dropout: float = 0.0
    activation: Literal["relu", "gelu", "leaky_relu"] = "gelu"
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    attention: AttentionConfig = AttentionConfig(kind="linear", head_width=64, qkv_bias=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(self, "n_layers", 1, 1000)


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(Config):
    """Settings of the embedding of tokens.

    Attributes
    ----------
    positions
        "rank": a learned embedding of each token's position in its cell (Geneformer). "none": the order is ignored.
    values
        "continuous": a small network of the value (scGPT). "bucket": one vector per bucket (scBERT). "soft_bins": a
        mixture of vectors (scFoundation). "none": tokens have no values.
    n_value_bins
        Number of vectors of "bucket" (the last one is for masked values) and of "soft_bins".
    bin_alpha
        Weight of the skip connection in "soft_bins".
    target_input
        Input of target tokens: "value" for the mask value, or "flag" for a flag instead of the value (scGPT's pretraining).
    n_token_types
        Number of rows of a token-type embedding, of which only the first is used (Geneformer's BERT stores two).
    gene_norm
        Whether the gene embedding has a layer norm (scGPT).
    train_genes
        Whether the gene embedding is trained; scBERT's gene2vec is not.
    norm
        Whether the summed embedding has layer norm and dropout (BERT).
    batch_norm
        Batch norm of the summed embedding: "shared" by all cells, "domain" for one per experimental batch (scGPT), or "none".
    """

    positions: Literal["none", "rank"] = "rank"
    values: Literal["none", "continuous", "bucket", "soft_bins"] = "none"
    n_value_bins: int = 0
    bin_alpha: float = 1.0
    target_input: Literal["value", "flag"] = "value"
    n_token_types: int = 0
    gene_norm: bool = False
    train_genes: bool = True
    norm: bool = True
    batch_norm: Literal["none", "shared", "domain"] = "none"

    def __post_init__(self) -> None:
        if self.values in ("bucket", "soft_bins"):
            require_between(self, "n_value_bins", 2, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    """Settings of the pretraining heads.

    Attributes
    ----------
    genes
        Whether masked genes are predicted.
    values
        Head for values: "mlp" (scGPT), "linear" (scFoundation), "bucket" (scBERT) or "none".
    zeros
        Whether the "mlp" heads also predict the probability that a value is 0.
    values_from_cells
        Whether values are also predicted from the embedding of the cell (scGPT's MVC).
    batch_labels
        Whether the experimental batch is an input of the value heads (scGPT).
    batches
        Whether a discriminator predicts the experimental batch, for gradient reversal.
    """

    genes: bool = True
    values: Literal["none", "mlp", "linear", "bucket"] = "none"
    zeros: bool = False
    values_from_cells: bool = False
    batch_labels: bool = False
    batches: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassHeadConfig(Config):
    """Settings of the classification of cells or genes.

    Attributes
    ----------
    kind
        "batch_norm" (scfm's), "pooler" (BERT), "token" (BERT, one class per gene), "mlp" (scGPT), "panel" (scBERT).
    n_classes
        Number of classes; 0 for no head.
    n_layers
        Number of layers of "mlp" and of the batch discriminator.
    dropout
        Dropout probability in the head.
    gene_classifier
        Whether predictions are those of an ensemble of the head and linear classifiers of log-expression.
    n_novelty_components
        Components of log-expression in which the distance of a cell from all classes is measured; 0 for no novelty score.
    """

    kind: Literal["batch_norm", "pooler", "token", "mlp", "panel"] = "batch_norm"
    n_classes: int = 0
    n_layers: int = 3
    dropout: float = 0.0
    gene_classifier: bool = False
    n_novelty_components: int = 0

    def __post_init__(self) -> None:
        require_between(self, "n_classes", 0, 10_000_000)
        require_between(self, "n_layers", 1, 100)
        require_between(self, "n_novelty_components", 0, 1000)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ClassHeadConfig.dropout is {self.dropout}; it must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class PoolingConfig(Config):
    """Settings of the pooling of token states to the embedding of a cell.

    Attributes
    ----------
    how
        "mean" or "max" over gene tokens, "weighted" for their mean weighted by expression (the value, or 1 / (1 + rank / 50)
        if the encoding has only ranks), "cls" for the first token, or "concat" for four concatenated parts (scFoundation).
    hidden_layer
        Index of the hidden state to pool: 0 is the input of the first block, and -1 the last hidden state.
    normalize
        Whether embeddings are divided by their norm (scGPT).
    """

    how: Literal["mean", "weighted", "max", "cls", "concat"] = "mean"
    hidden_layer: int = -1
    normalize: bool = False
