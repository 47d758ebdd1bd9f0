"""Cells and counts: packed batches, count matrices, files, splits, samplers, and stores of encoded cells."""

from scfm.data.batch import CellBatch
from scfm.data.compiled_encoder import encoder_info
from scfm.data.sampler import TokenBudgetSampler
from scfm.data.source import CountSource
from scfm.data.splits import Split, split_cells
from scfm.data.store import TokenStore

__all__ = [
    "CellBatch",
    "CountSource",
    "Split",
    "TokenBudgetSampler",
    "TokenStore",
    "encoder_info",
    "split_cells",
]
