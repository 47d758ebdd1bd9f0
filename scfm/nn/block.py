"""The transformer block on packed cells."""

# Axes: T packed tokens, H heads, D model width, K head width.

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from scfm import ops
from scfm.nn.linear import Linear
from scfm.ops.attention import Backend

if TYPE_CHECKING:
    from scfm.models.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}


class Attention(nn.Module):
    """Multi-head self-attention inside each cell; one projection makes queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        width = config.n_heads * config.d_head
        self.qkv = Linear(config.d_model, 3 * width, bias=config.qkv_bias)
        self.out = Linear(width, config.d_model)
        self.backend: Backend = "auto"

    def forward(self, hidden_TD: Tensor, plan: ops.AttentionPlan) -> Tensor:
        qkv_T3HK = self.qkv(hidden_TD).view(-1, 3, self.n_heads, self.d_head)
        query_THK, key_THK, value_THK = qkv_T3HK.unbind(1)
        attended_THK = ops.attention(
            query_THK, key_THK, value_THK, plan.cu_seqlens, n_known=plan.n_known, plan=plan, backend=self.backend
        )
        return self.out(attended_THK.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.dropout if config.dropout_in_feed_forward else 0.0

    def forward(self, hidden_TD: Tensor) -> Tensor:
        inner = F.dropout(self.activation(self.up(hidden_TD)), self.dropout, self.training)
        return self.down(inner)


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a layer norm before ("pre") or after ("post") it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.norm_first = config.norm == "pre"
        self.dropout = config.dropout

    def forward(self, hidden_TD: Tensor, plan: ops.AttentionPlan) -> Tensor:
        if self.norm_first:
            hidden_TD = hidden_TD + self._drop(self.attention(self.attention_norm(hidden_TD), plan))
            return hidden_TD + self._drop(self.feed_forward(self.feed_forward_norm(hidden_TD)))
        hidden_TD = self.attention_norm(hidden_TD + self._drop(self.attention(hidden_TD, plan)))
        return self.feed_forward_norm(hidden_TD + self._drop(self.feed_forward(hidden_TD)))

    def _drop(self, hidden_TD: Tensor) -> Tensor:
        return F.dropout(hidden_TD, self.dropout, self.training)
