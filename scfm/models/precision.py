"""The network in another precision, for inference."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from scfm.models.network import CellTransformer


def in_bfloat16(network: CellTransformer) -> CellTransformer:
    """Return a network with blocks in bfloat16, which shares embedding and heads with `network`; both are set to inference.

    The blocks are converted at every call, which takes less than a hundredth of the time for 48 cells. A copy that is kept
    would have to be compared with the weights, which takes as long.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in network.buffers()}
    memo |= {id(module): module for module in network.children()}
    for module in (network.blocks, network.norm):
        del memo[id(module)]
        memo |= {id(tensor): _converted(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(network, memo).eval()


def _converted(tensor: Tensor) -> Tensor:
    copied = tensor.detach().bfloat16() if tensor.is_floating_point() else tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
