"""Cells and counts: packed batches, matrices in every form, files, splits, samplers, stores."""

from scfm.data.batch import CellBatch
from scfm.data.host import host_info
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
    "host_info",
    "split_cells",
]
