"""`ModelConfig`: the settings of the network; each model family has other settings of the same network."""

from __future__ import annotations

from dataclasses import dataclass, field

from scfm.nn.config import (
    BlockConfig,
    ClassHeadConfig,
    DecoderConfig,
    EmbeddingConfig,
    HeadConfig,
    PoolingConfig,
    require_between,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(BlockConfig):
    """Settings of the network, which are saved as JSON with every model.

    Settings that differ between families are in groups, one for each part of the network. The fields of
    `scfm.nn.config.BlockConfig` (`d_model`, `n_heads`, `d_ff`, `dropout`, `norm`, `attention`, ...) are the settings of the
    blocks.

    Attributes
    ----------
    n_tokens
        Number of rows of the gene embedding: the length of the vocabulary.
    pad_id
        Id of the padding token, whose embedding stays zero (published vocabularies have one); None if there is none.
    context_length
        Maximum number of tokens of a cell, and number of learned positions if the network embeds ranks.
    n_layers
        Number of blocks.
    n_batches
        Number of experimental batches, for the parts of the network that depend on them (`EmbeddingConfig.batch_norm`,
        `HeadConfig.batch_labels` and `HeadConfig.batches`).
    final_norm
        Whether the output of the last block has a layer norm.
    embedding, heads, classes, pooling
        Settings of the token embedding, the pretraining heads, the class head, and the pooling to cell embeddings.
    decoder
        Settings of a decoder over all genes (scFoundation); None if there is no decoder.

    Raises
    ------
    ValueError
        If a size is out of range, or `d_model` cannot be divided among the heads.

    Examples
    --------
    >>> import scfm
    >>> config = scfm.ModelConfig(n_tokens=1000, d_model=64, n_heads=4, n_layers=2)
    >>> config.d_head
    16
    >>> config.replace(n_layers=3, pooling={"how": "cls"}).pooling.how
    'cls'
    """

    n_tokens: int
    pad_id: int | None = 0
    context_length: int = 2048
    n_layers: int = 4
    n_batches: int = 0
    final_norm: bool = False
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)
    classes: ClassHeadConfig = field(default_factory=ClassHeadConfig)
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    decoder: DecoderConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, largest in (("n_tokens", 100_000_000), ("context_length", 100_000_000), ("n_layers", 1000)):
            require_between(self, name, 1, largest)
        needs_batches = self.embedding.batch_norm == "domain" or self.heads.batch_labels or self.heads.batches
        if needs_batches or self.n_batches < 0:
            require_between(self, "n_batches", 1, 100_000)
        if self.pad_id is not None and not 0 <= self.pad_id < self.n_tokens:
            raise ValueError(f"ModelConfig.pad_id is {self.pad_id}; the vocabulary has {self.n_tokens} tokens.")

    @property
    def d_value_input(self) -> int:
        """Width of the input of scGPT's value heads: the token state, and the batch embedding if there is one."""
        return 2 * self.d_model if self.heads.batch_labels else self.d_model

    @property
    def d_embedding(self) -> int:
        """Width of the embedding of a cell."""
        return self.width_of(self.pooling.how)

    def width_of(self, pooling: str) -> int:
        """Width of the embedding of a cell that is pooled in this way."""
        return 4 * self.d_model if pooling == "concat" else self.d_model

    @property
    def redraw_interval(self) -> int | None:
        """Number of training steps after which random features are resampled; None without linear attention."""
        linear = [each for each in (self, self.decoder) if each is not None and each.attention.kind == "linear"]
        return linear[0].attention.redraw_interval if linear else None
