"""Choose the trainable weights, and switch activation checkpointing and compilation of the blocks on and off."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scfm.data import CellBatch
from scfm.models.network import CellTransformer
from scfm.nn.linear import Linear
from scfm.objectives import Objective, total
from scfm.ops.linear import linear
from scfm.train.config import kind_and_number

COMPILE_BACKEND: Any = "inductor"
HEADS = ("class_head", "gene_head", "value_head", "value_from_cell_head", "batch_head", "batch_labels")


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a trainable update of rank r: W x + b + (alpha / r) B A x (LoRA, Hu et al. 2022).

    B starts at zero, so that training starts from the unchanged layer. alpha is 2 r.
    """

    def __init__(self, base: Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = 2.0
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        return self.base(input) + self.scale * linear(linear(input, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return a plain linear layer whose weights include the update."""
        self.base.weight += self.scale * self.up @ self.down
        return self.base


def set_trainable(network: CellTransformer, how: str) -> int:
    """Freeze all weights except those that `how` selects, and return the number of trainable parameters.

    Parameters
    ----------
    network
        Changed in place. Call `merge` after training, which removes the layers that "lora:R" adds.
    how
        "all", "head" (the heads), "last:N" (heads and last N blocks) or "lora:R" (heads and low-rank updates of rank R).

    Examples
    --------
    >>> import scfm
    >>> classes = scfm.nn.ClassHeadConfig(n_classes=3)
    >>> network = scfm.models.CellTransformer(
    ...     scfm.ModelConfig(n_tokens=50, d_model=32, n_heads=2, n_layers=2, classes=classes)
    ... )
    >>> everything, head = [scfm.train.set_trainable(network, how) for how in ("all", "head")]
    >>> head < everything / 10
    True
    """
    kind, number = kind_and_number(how)
    read = _blocks_read(network)
    if kind == "last" and not 1 <= number <= len(read):
        raise ValueError(f"`trainable` is {how!r}; {len(read)} blocks of the network are used.")
    for parameter in network.parameters():
        parameter.requires_grad_(kind == "all")
    heads = [head for name in HEADS if (head := getattr(network, name, None)) is not None]
    free: list[nn.Module] = list(heads) if kind != "all" else []
    if kind == "last":
        free += read[-number:]
    for module in free:
        module.requires_grad_(True)
    _freeze_as_configured(network)
    if kind == "lora":
        _add_low_rank(network, number)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def freeze_unused(network: CellTransformer, objective: Objective, cells: CellBatch) -> list[str]:
    """Freeze parameters that the loss does not depend on, and return their names.

    Without this, distributed training would wait for gradients of these parameters, which are never computed.

    Parameters
    ----------
    network
        Changed in place. `merge` makes the parameters trainable again.
    objective
        The objective at any step; the heads that it uses are the same at all steps.
    cells
        Some cells, to compute a loss.
    """
    inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    device = network.embedding.gene.weight.device
    network.eval()  # no dropout, and no update of statistics
    with torch.random.fork_rng():
        loss = total(objective.loss(network, inputs.to(device), {k: v.to(device) for k, v in targets.items()}))
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    unused = [name for (name, _), gradient in zip(named, gradients) if gradient is None]
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    return unused


def _blocks_read(network: CellTransformer) -> list[nn.Module]:
    """Blocks that the loss depends on. Geneformer's cell embedding, and a class head on it, do not use the last block."""
    config, blocks = network.config, list(network.blocks)
    if network.class_head is None or config.classes.kind != "batch_norm":
        return blocks
    return blocks[: config.pooling.hidden_layer % (config.n_layers + 1)]


def merge(network: CellTransformer) -> None:
    """Add low-rank updates to the weights of their layers, and make all weights trainable again.

    Parameters
    ----------
    network
        Changed in place. Layers without a low-rank update keep their weights.

    Examples
    --------
    >>> import scfm
    >>> classes = scfm.nn.ClassHeadConfig(n_classes=3)
    >>> network = scfm.models.CellTransformer(
    ...     scfm.ModelConfig(n_tokens=50, d_model=32, n_heads=2, n_layers=1, classes=classes)
    ... )
    >>> names = set(network.state_dict())
    >>> _ = scfm.train.set_trainable(network, "lora:2")
    >>> set(network.state_dict()) == names
    False
    >>> scfm.train.merge(network)
    >>> set(network.state_dict()) == names
    True
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear):
                setattr(parent, name, child.merged())
    network.requires_grad_(True)
    _freeze_as_configured(network)


def _freeze_as_configured(network: CellTransformer) -> None:
    """Freeze what a model family never trains: scBERT's gene embedding, scFoundation's padding vector."""
    if not network.config.embedding.train_genes:
        network.embedding.gene.requires_grad_(False)
    if (padding := getattr(network.embedding.value, "pad", None)) is not None:
        padding.requires_grad_(False)


def _add_low_rank(network: CellTransformer, rank: int) -> None:
    for block in network.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, LowRankLinear(child, rank).to(child.weight.device))


def recompute_blocks(network: CellTransformer) -> None:
    """Let each block recompute its activations in the backward pass instead of keeping them."""
    for block in network.blocks:
        block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=False)


def keep_activations(network: CellTransformer) -> None:
    """Undo `recompute_blocks`."""
    for block in network.blocks:
        block.__dict__.pop("forward", None)


def compile_blocks(network: CellTransformer) -> None:
    """Let torch compile each block at its first use, for batches of any shape."""
    for block in network.blocks:
        block.compile(dynamic=True, backend=COMPILE_BACKEND)


def run_eagerly(network: CellTransformer) -> None:
    """Undo `compile_blocks`."""
    for block in network.blocks:
        block._compiled_call_impl = None
