"""Building blocks of the network: embedding, transformer block, pooling, heads."""

from scfm.nn.block import Attention, Block, FeedForward
from scfm.nn.class_heads import ClassHead, GeneClassifier, make_class_head
from scfm.nn.config import (
    AttentionConfig,
    BlockConfig,
    ClassHeadConfig,
    DecoderConfig,
    EmbeddingConfig,
    HeadConfig,
    PoolingConfig,
)
from scfm.nn.embedding import TokenEmbedding
from scfm.nn.heads import BatchLabels, BucketHead, GeneHead, LinearValueHead, ValueFromCellHead, ValueHead
from scfm.nn.linear import Linear
from scfm.nn.novelty import ClassGaussians
from scfm.nn.pooling import expression_weights, pool_cells

__all__ = [
    "PoolingConfig",
    "HeadConfig",
    "EmbeddingConfig",
    "DecoderConfig",
    "ClassHeadConfig",
    "BlockConfig",
    "AttentionConfig",
    "Attention",
    "BatchLabels",
    "Block",
    "BucketHead",
    "ClassGaussians",
    "ClassHead",
    "FeedForward",
    "GeneClassifier",
    "GeneHead",
    "Linear",
    "LinearValueHead",
    "TokenEmbedding",
    "ValueFromCellHead",
    "ValueHead",
    "make_class_head",
    "expression_weights",
    "pool_cells",
]
