"""Published tensor names of a Performer, the architecture of scBERT and of scFoundation's decoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from scfm.models.io.tensors import WeightMapping, tied, weight, weight_and_bias

COUNTERS = ("calls_since_last_redraw", "proj_updater.calls_since_last_redraw")


def block_weights(n_layers: int, ours: str, theirs: str) -> list[WeightMapping]:
    """Return the mappings of the tensors of every layer; `ours` and `theirs` are prefixes without a final dot."""
    listed: list[WeightMapping] = []
    for layer in range(n_layers):
        block, attention, forward = (
            f"{ours}.{layer}",
            f"{theirs}.net.layers.{layer}.0",
            f"{theirs}.net.layers.{layer}.1",
        )
        projections = [f"{attention}.fn.to_{name}.weight" for name in "qkv"]
        listed.append(weight(f"{block}.attention.qkv.weight", *projections))
        listed.append(weight(f"{block}.attention.projection_MK", f"{attention}.fn.fast_attention.projection_matrix"))
        listed += weight_and_bias(f"{block}.attention.out", f"{attention}.fn.to_out")
        listed += weight_and_bias(f"{block}.attention_norm", f"{attention}.norm")
        listed += weight_and_bias(f"{block}.feed_forward_norm", f"{forward}.norm")
        listed += weight_and_bias(f"{block}.feed_forward.up", f"{forward}.fn.fn.w1")
        listed += weight_and_bias(f"{block}.feed_forward.down", f"{forward}.fn.fn.w2")
    return listed


def counter_name(state: Mapping[str, Tensor], performer: str) -> str:
    """Return the name of the counter of steps since random features were resampled."""
    return next(
        (f"{performer}.{name}" for name in COUNTERS if f"{performer}.{name}" in state), f"{performer}.{COUNTERS[0]}"
    )


def registered_twice(state: Mapping[str, Tensor], performer: str, source: str) -> dict[str, str]:
    """Return the tensors that versions with a `proj_updater` store twice, with the reason."""
    prefix = f"{performer}.proj_updater.instance."
    copies = {name: f"{performer}.net.{name.removeprefix(prefix)}" for name in state if name.startswith(prefix)}
    return tied(state, copies, source)
