"""scFoundation's decoder: a light Performer over every gene of the panel, expressed or not."""

# Axes: T packed tokens, D width of the encoder, E width of the decoder.

from __future__ import annotations

from torch import Tensor, nn

from scfm import ops
from scfm.models.config import ModelConfig
from scfm.nn import Block, Linear


class Decoder(nn.Module):
    """A linear layer to the decoder's width, pre-norm blocks with linear attention, and two layer norms.

    Published code normalises twice, once at the end of the Performer and once more before the value head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.decoder_config
        self.project = Linear(config.d_model, decoder.d_model)
        self.blocks = nn.ModuleList(Block(decoder) for _ in range(decoder.n_layers))
        self.inner_norm = nn.LayerNorm(decoder.d_model, eps=decoder.norm_eps)
        self.norm = nn.LayerNorm(decoder.d_model, eps=decoder.norm_eps)

    def forward(self, hidden_TD: Tensor, plan: ops.AttentionPlan) -> Tensor:
        """States of all tokens, shape (T, E)."""
        hidden_TE = self.project(hidden_TD)
        for block in self.blocks:
            hidden_TE = block(hidden_TE, plan)
        return self.norm(self.inner_norm(hidden_TE))
