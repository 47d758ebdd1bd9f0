"""Settings of the parts of a network, one frozen group for each part that reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from scfm._config import Config


def require_between(config: Config, name: str, smallest: int, largest: int) -> None:
    """Raise `ValueError` unless a field lies in a range, so that absurd sizes are refused before anything is built."""
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
        Width, number of attention heads, width of the feed-forward.
    dropout, dropout_in_feed_forward
        Probability of dropout, and whether it is also applied inside the feed-forward.
    activation, norm, norm_eps
        Activation of the feed-forward; position of the layer norms ("pre" or "post") and their epsilon.
    attention
        Settings of its attention.
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
                f"{type(self).__name__}.d_model is {self.d_model}, which {self.n_heads} heads do not divide. "
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
    """A Performer over all genes that follows the encoder of the expressed ones (scFoundation)."""

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
        "rank": a learned embedding of each token's position in its cell (Geneformer). "none": cells are sets.
    values
        "continuous": values pass through a small network (scGPT). "bucket": one vector per bucket (scBERT). "soft_bins":
        a mixture of vectors (scFoundation). "none": tokens are genes only.
    n_value_bins
        Number of vectors of "bucket" (the last one means masked) and of "soft_bins".
    bin_alpha
        Weight of the direct path in "soft_bins".
    target_input
        What a target token gets: its masked "value", or a "flag" in place of the value (scGPT's pretraining).
    n_token_types
        Number of rows of a token-type embedding, of which only the first is used (Geneformer's BERT stores two).
    gene_norm
        Layer norm of the gene embedding alone (scGPT).
    train_genes
        Whether the gene embedding is trained; scBERT's gene2vec is not.
    norm
        Layer norm and dropout of the summed embedding (BERT).
    batch_norm
        Batch norm of the summed embedding: "shared", or a "domain" for each experimental batch (scGPT).
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
    """Settings of the heads for pretraining.

    Attributes
    ----------
    genes
        Whether masked genes are predicted.
    values
        How values are predicted: "mlp" (scGPT), "linear" (scFoundation), "bucket" (scBERT), or not ("none").
    zeros
        Whether the "mlp" heads also predict if a value is 0.
    values_from_cells
        Whether values are also predicted from the embedding of the cell (scGPT's MVC).
    batch_labels
        Whether the value heads read the experimental batch along with the state (scGPT).
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
    """Settings of the classification of cells, or of genes.

    Attributes
    ----------
    kind
        "batch_norm" (scfm's), "pooler" (BERT), "token" (BERT, one class per gene), "mlp" (scGPT), "panel" (scBERT).
    n_classes
        Number of classes; 0 for no head.
    n_layers
        Number of layers of "mlp", and of the discriminator of batches.
    dropout
        Probability of dropout in the head.
    gene_classifier
        Whether a linear classifier of log-expression forms an ensemble with the head.
    """

    kind: Literal["batch_norm", "pooler", "token", "mlp", "panel"] = "batch_norm"
    n_classes: int = 0
    n_layers: int = 3
    dropout: float = 0.0
    gene_classifier: bool = False

    def __post_init__(self) -> None:
        require_between(self, "n_classes", 0, 10_000_000)
        require_between(self, "n_layers", 1, 100)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ClassHeadConfig.dropout is {self.dropout}; it must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class PoolingConfig(Config):
    """How the embedding of a cell is made of the states of its tokens.

    Attributes
    ----------
    how
        "mean" or "max" over gene tokens, "cls" for the first token, "concat" (scFoundation) for four parts in a row.
    hidden_layer
        Hidden state to pool, counted as Python counts: -1 is the last, 0 the input of the first block.
    normalize
        Whether embeddings are divided by their length (scGPT).
    """

    how: Literal["mean", "max", "cls", "concat"] = "mean"
    hidden_layer: int = -1
    normalize: bool = False
