"""Building blocks of the network: embeddings, transformer block, pooling, heads."""

from scfm.nn.block import Attention, Block, FeedForward
from scfm.nn.embedding import ContinuousValueEmbedding, TokenEmbedding
from scfm.nn.heads import ClassHead, GeneHead, ValueFromCellHead, ValueHead
from scfm.nn.linear import Linear
from scfm.nn.pooling import pool_cells

__all__ = [
    "Attention",
    "Block",
    "ClassHead",
    "ContinuousValueEmbedding",
    "FeedForward",
    "GeneHead",
    "Linear",
    "TokenEmbedding",
    "ValueFromCellHead",
    "ValueHead",
    "pool_cells",
]
