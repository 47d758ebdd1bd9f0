"""scFoundation's decoder: a small Performer over all genes of the vocabulary, including those that are not expressed."""

# Axes: T packed tokens, D width of the encoder, E width of the decoder.

from __future__ import annotations

from torch import Tensor, nn

from scfm import ops
from scfm.nn import Block, Linear
from scfm.nn.config import DecoderConfig


class Decoder(nn.Module):
    """A linear layer to the decoder's width, pre-norm blocks with linear attention, and two layer norms.

    The published code has two layer norms, one at the end of the Performer and one before the value head.
    """

    def __init__(self, d_input: int, config: DecoderConfig) -> None:
        super().__init__()
        self.project = Linear(d_input, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.inner_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def forward(self, hidden_TD: Tensor, plan: ops.AttentionPlan) -> Tensor:
        """Return the states of all tokens, shape (T, E)."""
        hidden_TE = self.project(hidden_TD)
        for block in self.blocks:
            hidden_TE = block(hidden_TE, plan)
        return self.norm(self.inner_norm(hidden_TE))
