"""The transformer block on packed cells."""

# Axes: T packed tokens, H heads, D model width, K head width, M random features.

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scfm import ops
from scfm.nn.dropout import add_dropped, dropout
from scfm.nn.linear import Linear
from scfm.ops.attention import Backend

if TYPE_CHECKING:
    from scfm.models.config import ModelConfig


def _relu(inner_TD: Tensor) -> Tensor:
    """ReLU; in place at inference, where nobody else holds what it reads."""
    return F.relu(inner_TD) if torch.is_grad_enabled() else F.relu_(inner_TD)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": _relu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}


class Attention(nn.Module):
    """Multi-head self-attention inside each cell; one projection makes queries, keys and values.

    With `attention="linear"` the softmax is replaced by random features (FAVOR+), whose projection is saved with the
    weights.
    """

    projection_MK: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        width = config.n_heads * config.d_head
        self.qkv = Linear(config.d_model, 3 * width, bias=config.qkv_bias)
        self.out = Linear(width, config.d_model)
        self.skip_unknown_out = config.skip_unknown_out
        self.backend: Backend = "auto"
        linear = config.attention == "linear"
        projection_MK = ops.random_projection(config.n_random_features, config.d_head) if linear else None
        self.register_buffer("projection_MK", projection_MK)

    def forward(self, hidden_TD: Tensor, plan: ops.AttentionPlan, at_N: Tensor | None = None) -> Tensor:
        """What each token, or each of those at the places `at_N`, takes from its cell, shape (T, D) or (N, D)."""
        qkv_T3HK = self.qkv(hidden_TD).view(-1, 3, self.n_heads, self.d_head)
        query_THK, key_THK, value_THK = qkv_T3HK.unbind(1)
        if at_N is not None:
            query_THK = query_THK.index_select(0, at_N)
        if self.projection_MK is not None:
            attended_THK = ops.linear_attention(
                query_THK, key_THK, value_THK, plan.cu_seqlens, self.projection_MK, plan=plan
            )
        else:
            attended_THK = ops.attention(
                query_THK,
                key_THK,
                value_THK,
                plan.cu_seqlens,
                cu_seqlens_k=plan.cu_seqlens_k,
                n_known=plan.n_known,
                plan=plan,
                backend=self.backend,
            )
        attended_TD = attended_THK.flatten(1)
        if not self.skip_unknown_out or plan.n_known is None:
            return self.out(attended_TD)
        return torch.where(unknown_tokens(plan).to(hidden_TD.device)[:, None], attended_TD, self.out(attended_TD))

    @torch.no_grad()
    def redraw_projection(self) -> None:
        """Draw the random features anew (linear attention only)."""
        assert self.projection_MK is not None
        self.projection_MK.copy_(ops.random_projection(*self.projection_MK.shape))


def unknown_tokens(plan: ops.AttentionPlan) -> Tensor:
    """Which tokens the generative mask calls unknown, shape (T,), bool, on the host."""
    assert plan.n_known is not None
    lengths_B, n_tokens = plan.cu_seqlens.diff(), int(plan.cu_seqlens[-1])
    first_unknown_T = torch.repeat_interleave(plan.cu_seqlens[:-1] + plan.n_known, lengths_B, output_size=n_tokens)
    return torch.arange(n_tokens) >= first_unknown_T


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.dropout if config.dropout_in_feed_forward else 0.0

    def forward(self, hidden_TD: Tensor) -> Tensor:
        inner = dropout(self.activation(self.up(hidden_TD)), self.dropout, self.training)
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

    def forward(self, hidden_TD: Tensor, plan: ops.AttentionPlan, at_N: Tensor | None = None) -> Tensor:
        """States of all tokens, shape (T, D); or of those at the places `at_N` alone, shape (N, D).

        `plan` has the boundaries of `at_N`, ascending, as queries, and those of the cells as keys.
        """
        own_TD = hidden_TD if at_N is None else hidden_TD.index_select(0, at_N)
        if self.norm_first:
            hidden_TD = self._add(own_TD, self.attention(self.attention_norm(hidden_TD), plan, at_N))
            return self._add(hidden_TD, self.feed_forward(self.feed_forward_norm(hidden_TD)))
        hidden_TD = self.attention_norm(self._add(own_TD, self.attention(hidden_TD, plan, at_N)))
        return self.feed_forward_norm(self._add(hidden_TD, self.feed_forward(hidden_TD)))

    def _add(self, hidden_TD: Tensor, update_TD: Tensor) -> Tensor:
        return add_dropped(hidden_TD, update_TD, self.dropout, self.training)
