"""Tensors under published names and under ours: every one is accounted for, in both directions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from scfm._untrusted import check_torch_file, require_downloaded
from scfm.errors import ModelFileError
from scfm.models.config import ModelConfig
from scfm.models.network import CellTransformer

State = dict[str, Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightMapping:
    """One tensor of ours, and the published tensors that make it when stacked along their rows."""

    ours: str
    theirs: tuple[str, ...]


def weight(ours: str, *theirs: str) -> WeightMapping:
    return WeightMapping(ours, theirs)


def weight_and_bias(ours: str, theirs: str) -> list[WeightMapping]:
    """Weight and bias of one module."""
    return [weight(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def fill_network(
    network: CellTransformer,
    state: Mapping[str, Tensor],
    mappings: Iterable[WeightMapping],
    *,
    source: str,
    unused: Mapping[str, str] | None = None,
    strict: bool = True,
) -> dict[str, str]:
    """Load published tensors into a network, all or none.

    Parameters
    ----------
    network
        Built from the checkpoint's configuration.
    state
        Published tensors by name.
    mappings
        Where each belongs; together they must name every tensor of the network.
    source
        What to call the checkpoint in errors.
    unused
        Published tensors that are rightly left out, and why.
    strict
        False to warn with the list of faults where an error would be raised, and load the rest.

    Returns
    -------
    Published names that were not loaded, with the reason.

    Raises
    ------
    ModelFileError
        With every missing, unknown and misshapen tensor; the network is then untouched.
    """
    unused, mappings, wanted = dict(unused or {}), list(mappings), network.state_dict()
    assert {entry.ours for entry in mappings} == set(wanted), "a tensor of the network has no published name"
    faults, loaded = [], {}
    for entry in mappings:
        found = _faults_of(entry, state, wanted[entry.ours])
        if found:
            faults += found
        else:
            parts = [state[name] for name in entry.theirs]
            loaded[entry.ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    named = {name for entry in mappings for name in entry.theirs}
    unknown = [name for name in state if name not in named and name not in unused]
    faults += [f"unknown: {name}" for name in unknown]
    if faults:
        listing = "\n  ".join(faults)
        if strict:
            raise ModelFileError(
                f"{source} does not fit the network that its configuration names, and nothing was loaded:\n  {listing}\n"
                "Check that the files belong together, or load what fits with `strict=False`."
            )
        warnings.warn(f"{source} was loaded without:\n  {listing}", stacklevel=4)
        unused |= dict.fromkeys(unknown, "unknown name")
    network.load_state_dict(wanted | loaded)
    log.info("%s: %d tensors loaded, unused: %s", source, len(named & set(state)), unused or "none")
    return unused


def _faults_of(entry: WeightMapping, state: Mapping[str, Tensor], wanted: Tensor) -> list[str]:
    faults = [f"missing: {name}" for name in entry.theirs if name not in state]
    shape = tuple(wanted.shape)
    if len(entry.theirs) > 1:
        shape = (shape[0] // len(entry.theirs), *shape[1:])
    for name in entry.theirs:
        if name not in state:
            continue
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            faults.append(f"no tensor: {name} is a {type(tensor).__name__}")
        elif tuple(tensor.shape) != shape:
            faults.append(f"shape: {name} is {tuple(tensor.shape)}, not {shape}")
    return faults


def read_network(network: CellTransformer, mappings: Iterable[WeightMapping]) -> State:
    """Give a network's tensors their published names: the inverse of `fill_network`, to the bit."""
    state = network.state_dict()
    published: State = {}
    for entry in mappings:
        parts = (
            state[entry.ours].detach().cpu().chunk(len(entry.theirs)) if len(entry.theirs) > 1 else [state[entry.ours]]
        )
        published |= {name: part.detach().cpu().clone() for name, part in zip(entry.theirs, parts)}
    return published


def tied(state: Mapping[str, Tensor], copies: Mapping[str, str], source: str) -> dict[str, str]:
    """Account for tensors that are stored twice: each copy must equal its original.

    Parameters
    ----------
    copies
        Name of the copy to name of the original; those not in `state` are skipped.

    Returns
    -------
    Reasons for `fill_network`.
    """
    for copy, original in copies.items():
        if copy in state and (original not in state or not torch.equal(state[copy], state[original])):
            raise ModelFileError(
                f"{source}: {copy} should be the same tensor as {original}, and is not. "
                "The model was changed after it was tied, or the file is damaged; save it again from its framework."
            )
    return {copy: f"a copy of {original}" for copy, original in copies.items() if copy in state}


def read_torch(path: Path) -> Any:
    """Read a `torch.save` file with nothing but tensors and plain containers in it; code in it is never run.

    Raises
    ------
    ModelFileError
        If the file asks for anything else, or is damaged.
    """
    require_downloaded(path)
    check_torch_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol: the file is opened, or it is not
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        # torch's own words advise to switch its guard off.
        first_line = str(error).strip().partition("\n")[0]
        reason = "" if isinstance(error, UnpicklingError) or not first_line else f" ({first_line})"
        raise ModelFileError(
            f"{path} was not opened{reason}. Either it is damaged or cut short, or it "
            "holds more than tensors and plain containers, which could run code and is refused. Copy it again, or save its "
            "`state_dict()` alone."
        ) from None


def require(config: ModelConfig, settings: Mapping[str, Any], family: str) -> None:
    """Raise `ModelFileError` unless the network has the architecture of the family's published code.

    Settings are named with dots: "embedding.positions".
    """
    found = {name: reduce(getattr, name.split("."), config) for name in settings}
    faults = [f"{name} is {found[name]!r}, not {value!r}" for name, value in settings.items() if found[name] != value]
    if faults:
        raise ModelFileError(
            f"This model cannot be written as {family}, whose code has no such settings:\n  " + "\n  ".join(faults)
        )
