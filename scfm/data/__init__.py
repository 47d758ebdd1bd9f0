"""Cells and counts: packed batches, matrices in every form, splits, samplers, streams."""

from scfm.data.batch import CellBatch
from scfm.data.host import host_info
from scfm.data.matrix import CountMatrix
from scfm.data.sampler import TokenBudgetSampler
from scfm.data.splits import Split, split_cells

__all__ = ["CellBatch", "CountMatrix", "Split", "TokenBudgetSampler", "host_info", "split_cells"]
