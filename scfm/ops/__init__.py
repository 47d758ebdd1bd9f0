"""Attention on packed cells: compiled kernels where they are built, plain torch everywhere."""

from scfm.ops.attention import attention, attention_reference
from scfm.ops.extension import extension_info
from scfm.ops.plan import AttentionPlan, make_plan

__all__ = ["AttentionPlan", "attention", "attention_reference", "extension_info", "make_plan"]
