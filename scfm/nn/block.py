"""The transformer block on packed cells."""

# Axes: T packed tokens, H heads, D model width, K head width, M random features.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scfm import ops
from scfm.nn.config import BlockConfig
from scfm.nn.dropout import add_dropped, dropout
from scfm.nn.linear import Linear
from scfm.ops.attention import Backend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}


def add_linear(residual_TD: Tensor, layer: nn.Module, input_TD: Tensor, p: float, training: bool) -> Tensor:
    """Compute `residual + dropout(layer(input))`, in one pass if there is no dropout."""
    if isinstance(layer, Linear) and (p == 0 or not training):
        return layer(input_TD, residual=residual_TD)
    return add_dropped(residual_TD, layer(input_TD), p, training)


class Attention(nn.Module):
    """Multi-head self-attention within each cell, with one projection to queries, keys and values.

    Linear attention replaces the softmax by random features (FAVOR+), whose projection is saved with the weights.
    """

    projection_MK: Tensor | None

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        width = config.n_heads * config.d_head
        self.qkv = Linear(config.d_model, 3 * width, bias=config.attention.qkv_bias)
        self.out = Linear(width, config.d_model)
        self.skip_target_projection = config.attention.skip_target_projection
        self.dropout = config.dropout
        self.backend: Backend = "auto"
        linear = config.attention.kind == "linear"
        projection_MK = ops.random_projection(config.attention.n_random_features, config.d_head) if linear else None
        self.register_buffer("projection_MK", projection_MK)

    def forward(
        self, residual_TD: Tensor, hidden_TD: Tensor, plan: ops.AttentionPlan, at_N: Tensor | None = None
    ) -> Tensor:
        """Return `residual_TD` plus the attention output of each token, shape (T, D).

        With `at_N`, only the output for the tokens at these indices, shape (N, D); `residual_TD` has this shape too.
        """
        query_THK, key_THK, value_THK = self.project(hidden_TD)
        if at_N is not None:
            query_THK = query_THK.index_select(0, at_N)
        return self.add_output(residual_TD, self.attend(query_THK, key_THK, value_THK, plan), plan)

    def project(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of each token, each of shape (T, H, K)."""
        return self.split(self.qkv(hidden_TD))

    def split(self, projected_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of the output of `qkv` as queries, keys and values, each of shape (T, H, K)."""
        query_THK, key_THK, value_THK = projected_TX.view(-1, 3, self.n_heads, self.d_head).unbind(1)
        return query_THK, key_THK, value_THK

    def attend(self, query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, plan: ops.AttentionPlan) -> Tensor:
        """Return the attention output of each query over the keys of its cell, shape (T, H, K)."""
        if self.projection_MK is not None:
            return ops.linear_attention(
                query_THK,
                key_THK,
                value_THK,
                plan.cu_seqlens,
                self.projection_MK,
                cu_seqlens_k=plan.cu_seqlens_k,
                plan=plan,
                backend=self.backend,
            )
        return ops.attention(
            query_THK,
            key_THK,
            value_THK,
            plan.cu_seqlens,
            cu_seqlens_k=plan.cu_seqlens_k,
            n_known=plan.n_known,
            plan=plan,
            backend=self.backend,
        )

    def add_output(self, residual_TD: Tensor, attended_THK: Tensor, plan: ops.AttentionPlan | None = None) -> Tensor:
        """Return `residual_TD` plus the output projection of all heads, shape (T, D)."""
        attended_TD = attended_THK.flatten(1)
        if not self.skip_target_projection or plan is None or plan.n_known is None:
            return add_linear(residual_TD, self.out, attended_TD, self.dropout, self.training)
        is_target_TD = target_tokens(plan, residual_TD.device)[:, None]
        taken_TD = torch.where(is_target_TD, attended_TD, self.out(attended_TD))
        return add_dropped(residual_TD, taken_TD, self.dropout, self.training)

    @torch.no_grad()
    def redraw_projection(self) -> None:
        """Resample the random features (linear attention only); every process of a run gets the same ones."""
        assert self.projection_MK is not None
        seed = int(self.projection_MK.double().cpu().sum().view(torch.int64))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projection_MK.copy_(ops.random_projection(*self.projection_MK.shape))


def target_tokens(plan: ops.AttentionPlan, device: torch.device) -> Tensor:
    """Return which tokens are targets of the generative mask, shape (T,), bool."""
    assert plan.n_known is not None
    if plan.layout is not None and plan.layout.is_target_T is not None and plan.layout.device == device:
        return plan.layout.is_target_T
    lengths_B, n_tokens = plan.cu_seqlens.diff(), int(plan.cu_seqlens[-1])
    first_target_T = torch.repeat_interleave(plan.cu_seqlens[:-1] + plan.n_known, lengths_B, output_size=n_tokens)
    return (torch.arange(n_tokens) >= first_target_T).to(device)


class FeedForward(nn.Module):
    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.inner_dropout = config.dropout if config.dropout_in_feed_forward else 0.0
        self.dropout = config.dropout

    def forward(self, residual_TD: Tensor, hidden_TD: Tensor) -> Tensor:
        """Return `residual_TD` plus two layers applied to `hidden_TD`, shape (T, D)."""
        if self.activation is F.relu and isinstance(self.up, Linear):
            inner = self.up(hidden_TD, relu=True)
        else:
            inner = self.activation(self.up(hidden_TD))
        inner = dropout(inner, self.inner_dropout, self.training)
        return add_linear(residual_TD, self.down, inner, self.dropout, self.training)


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a layer norm before ("pre") or after ("post") it."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.norm_first = config.norm == "pre"

    def forward(self, hidden_TD: Tensor, plan: ops.AttentionPlan, at_N: Tensor | None = None) -> Tensor:
        """Return the states of all tokens, shape (T, D), or only of those at the ascending indices `at_N`, shape (N, D).

        With `at_N`, the queries of `plan` are the tokens at `at_N`, and its keys are all tokens.
        """
        residual_TD = hidden_TD if at_N is None else hidden_TD.index_select(0, at_N)
        return self._feed_forward(self.attention(residual_TD, self._attention_input(hidden_TD), plan, at_N))

    def project(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values for the input of the block, each of shape (T, H, K)."""
        return self.attention.project(self._attention_input(hidden_TD))

    def after_attention(self, hidden_TD: Tensor, attended_THK: Tensor) -> Tensor:
        """Return the output of the block for its input and the attention output of its heads, shape (T, D)."""
        return self._feed_forward(self.attention.add_output(hidden_TD, attended_THK))

    def with_keys(self, hidden_TD: Tensor, key_THK: Tensor, value_THK: Tensor, plan: ops.AttentionPlan) -> Tensor:
        """Return the output of the block if tokens attend to the given keys and values instead of theirs, shape (T, D)."""
        query_THK = self.project(hidden_TD)[0]
        return self.after_attention(hidden_TD, self.attention.attend(query_THK, key_THK, value_THK, plan))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the input of the block."""
        return self.attention_norm.weight.dtype

    def _attention_input(self, hidden_TD: Tensor) -> Tensor:
        return self.attention_norm(hidden_TD) if self.norm_first else hidden_TD

    def _feed_forward(self, hidden_TD: Tensor) -> Tensor:
        if self.norm_first:
            return self.feed_forward(hidden_TD, self.feed_forward_norm(hidden_TD))
        hidden_TD = self.attention_norm(hidden_TD)
        return self.feed_forward_norm(self.feed_forward(hidden_TD, hidden_TD))
