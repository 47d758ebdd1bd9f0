"""Cells and counts: packed batches, matrices in every form, files, splits, samplers, stores."""

from scfm.data.batch import CellBatch
from scfm.data.files import open_counts
from scfm.data.host import host_info
from scfm.data.matrix import CountMatrix
from scfm.data.sampler import TokenBudgetSampler
from scfm.data.splits import Split, split_cells
from scfm.data.store import TokenStore

__all__ = [
    "CellBatch",
    "CountMatrix",
    "Split",
    "TokenBudgetSampler",
    "TokenStore",
    "host_info",
    "open_counts",
    "split_cells",
]
