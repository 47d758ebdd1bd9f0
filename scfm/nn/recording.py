"""What a forward pass computes on its way, kept for tools that explain it."""

# Axes: T packed tokens, H heads, D model width, K head width, X all heads end to end.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from scfm.nn.block import Block


class AttentionStates(NamedTuple):
    """Queries, keys and values of one block, and what its heads took; gradients can be taken at `attended_TX`."""

    query_THK: Tensor
    key_THK: Tensor
    value_THK: Tensor
    attended_TX: Tensor


@dataclass
class Recording:
    """States of every block in the order of their computation, and the rank embeddings of the tokens, (T, D)."""

    attention: list[AttentionStates] = field(default_factory=list)
    ranks_TD: Tensor | None = None


@contextmanager
def record(blocks: Iterable[nn.Module], rank: nn.Module | None = None) -> Iterator[Recording]:
    """Keep what the forward passes inside the `with` statement compute.

    Parameters
    ----------
    blocks
        Instances of `Block`.
    rank
        Embedding of the ranks, if there is one.
    """
    recording = Recording()

    def keep_ranks(module: nn.Module, inputs: Any, output: Tensor) -> None:
        recording.ranks_TD = output

    with ExitStack() as hooks:
        for block in blocks:
            assert isinstance(block, Block)
            _record_block(block, recording, hooks)
        if rank is not None:
            hooks.callback(rank.register_forward_hook(keep_ranks).remove)
        yield recording


def _record_block(block: Block, recording: Recording, hooks: ExitStack) -> None:
    attention = block.attention
    projected: list[Tensor] = []

    def keep_projection(module: nn.Module, inputs: Any, output: Tensor) -> None:
        projected[:] = [output]

    def keep_states(module: nn.Module, inputs: Any) -> None:
        recording.attention.append(AttentionStates(*attention.split(projected.pop()), inputs[0]))

    hooks.callback(attention.qkv.register_forward_hook(keep_projection).remove)
    hooks.callback(attention.out.register_forward_pre_hook(keep_states).remove)
