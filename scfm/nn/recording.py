"""Record intermediate results of a forward pass, for functions that explain a model."""

# Axes: T packed tokens, H heads, D model width, K head width, X all heads end to end.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from scfm.nn.block import Block


class AttentionStates(NamedTuple):
    """Queries, keys, values and attention output of one block; `attended_TX` can be used to compute gradients."""

    query_THK: Tensor
    key_THK: Tensor
    value_THK: Tensor
    attended_TX: Tensor


@dataclass
class Recording:
    """States of all blocks in the order of computation, and rank embeddings of the tokens, shape (T, D)."""

    attention: list[AttentionStates] = field(default_factory=list)
    ranks_TD: Tensor | None = None


@contextmanager
def record(blocks: Iterable[nn.Module], rank: nn.Module | None = None) -> Iterator[Recording]:
    """Record the forward passes within the `with` statement.

    Parameters
    ----------
    blocks
        Instances of `Block`.
    rank
        Embedding of ranks, if the network has one.
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
