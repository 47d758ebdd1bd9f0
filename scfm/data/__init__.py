"""Cells and counts: packed batches, count matrices, files, splits, samplers, and stores of encoded cells."""

from scfm._remote import SomaPath
from scfm.data.batch import CellBatch
from scfm.data.compiled_encoder import encoder_info
from scfm.data.sampler import TokenBudgetSampler
from scfm.data.source import CountSource
from scfm.data.splits import Split, split_cells

__all__ = [
    "CellBatch",
    "CountSource",
    "SomaPath",
    "Split",
    "TokenBudgetSampler",
    "encoder_info",
    "split_cells",
]
