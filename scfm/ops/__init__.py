"""Attention on packed cells, in compiled kernels if they are built, otherwise in plain torch."""

from scfm.ops.attention import attention
from scfm.ops.extension import extension_info
from scfm.ops.keys import attention_scores, deletion_effects
from scfm.ops.linear import linear
from scfm.ops.linear_attention import linear_attention, random_projection
from scfm.ops.plan import AttentionPlan, make_plan

__all__ = [
    "AttentionPlan",
    "attention",
    "attention_scores",
    "deletion_effects",
    "extension_info",
    "linear",
    "linear_attention",
    "make_plan",
    "random_projection",
]
