"""Convert between the tensor names of published checkpoints and those of scfm; every tensor must be mapped or explained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from scfm.models.io.load import MAX_FAULTS, require_finite
from scfm.models.network import CellTransformer
from scfm.models.shapes import shapes_only
from scfm.vocab import Vocabulary

State = dict[str, Tensor]
log = logging.getLogger(__name__)

MIN_FITTING = 0.5  # if a smaller fraction of the tensors matches, the checkpoint is of another model
WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class WeightMapping:
    """One tensor of scfm, and the published tensors that form it when stacked along their rows."""

    ours: str
    theirs: tuple[str, ...]


def weight(ours: str, *theirs: str) -> WeightMapping:
    return WeightMapping(ours, theirs)


def weight_and_bias(ours: str, theirs: str) -> list[WeightMapping]:
    """Return the mappings of weight and bias of one module."""
    return [weight(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def build_network(
    config: ModelConfig,
    vocabulary: Vocabulary,
    state: Mapping[str, Tensor],
    mappings: Iterable[WeightMapping],
    *,
    source: str,
    unused: Mapping[str, str] | None = None,
    strict: bool = True,
) -> tuple[CellTransformer, dict[str, str]]:
    """Build a network from published tensors.

    Parameters
    ----------
    config
        Settings of the network.
    vocabulary
        Vocabulary of the network.
    state
        Published tensors by name.
    mappings
        The published names of each tensor of the network; together they must cover all of them.
    source
        Name of the checkpoint in error messages.
    unused
        Published tensors that the network does not need, with the reason.
    strict
        Whether all tensors must match. False loads those that match, and warns with a list of the others.

    Returns
    -------
    The network, and the published names that were not loaded, with the reason.

    Raises
    ------
    ModelFileError
        If tensors are missing, unknown or of the wrong shape; the message lists them. With `strict=False`, if most tensors do
        not match, or values are not finite. Memory for the network is allocated only after all tensors were compared.
    """
    unused, mappings = dict(unused or {}), list(mappings)
    named = {name for entry in mappings for name in entry.theirs}
    if len(set(named) & set(state)) < MIN_FITTING * len(named):
        raise _nothing_fits(source, state, named)
    with shapes_only():
        wanted = CellTransformer.for_vocabulary(config, vocabulary).state_dict()
    assert {entry.ours for entry in mappings} == set(wanted), "a tensor of the network has no published name"
    faults = [fault for entry in mappings for fault in _faults_of(entry, state, wanted[entry.ours])]
    fitting = [entry for entry in mappings if not _faults_of(entry, state, wanted[entry.ours])]
    unknown = [name for name in state if name not in named and name not in unused]
    faults += [f"unknown: {name}" for name in unknown]
    if len(fitting) < MIN_FITTING * len(mappings):
        raise _nothing_fits(source, state, named)
    if faults and strict:
        raise ModelFileError(
            f"{source} does not match the network of its configuration, and nothing was loaded:\n  {_listed(faults)}\n"
            f"Check that the files belong together, or load the {len(fitting)} of {len(mappings)} matching tensors with "
            "`strict=False`; the others get random values."
        )
    require_finite({name: state[name] for entry in fitting for name in entry.theirs}, source)
    network = CellTransformer.for_vocabulary(config, vocabulary)
    loaded = {entry.ours: _joined([state[name] for name in entry.theirs]) for entry in fitting}
    network.load_state_dict(network.state_dict() | loaded)
    if faults:
        warnings.warn(f"{source} was loaded without:\n  {_listed(faults)}", stacklevel=4)
        unused |= dict.fromkeys(unknown, "unknown name")
    log.info("%s: %d tensors loaded, unused: %s", source, len(set(named) & set(state)), unused or "none")
    return network, unused


def without_wrapper(state: Any, source: str) -> State:
    """Remove the prefix of `DataParallel`, `DistributedDataParallel` or `torch.compile` from all names, with a warning.

    Raises
    ------
    ModelFileError
        If `state` is not a dictionary of tensors.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ModelFileError(f"{source} holds a {type(state).__name__}, not a dictionary of tensors by name.")
    removed = ""
    while prefix := next((each for each in WRAPPERS if state and all(name.startswith(each) for name in state)), None):
        state, removed = {name.removeprefix(prefix): tensor for name, tensor in state.items()}, removed + prefix
    if removed:
        warnings.warn(f"{source}: the prefix {removed!r} was removed from the names of all tensors.", stacklevel=5)
    return state


def _nothing_fits(source: str, state: Mapping[str, Tensor], named: Collection[str]) -> ModelFileError:
    return ModelFileError(
        f"{source} does not hold the tensors of the network of its configuration: {len(set(named) & set(state))} of "
        f"{len(named)} names exist, and fewer than half match (in the file: {', '.join(list(state)[:3])}, ...; expected: "
        f"{', '.join(sorted(named)[:3])}, ...). It belongs to another model or another version of its package."
    )


def _listed(faults: Sequence[str]) -> str:
    rest = len(faults) - MAX_FAULTS
    return "\n  ".join([*faults[:MAX_FAULTS], *([f"and {rest} more"] if rest > 0 else [])])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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
    """Return the tensors of a network under their published names; this is the exact inverse of `build_network`."""
    state = network.state_dict()
    published: State = {}
    for entry in mappings:
        parts = (
            state[entry.ours].detach().cpu().chunk(len(entry.theirs)) if len(entry.theirs) > 1 else [state[entry.ours]]
        )
        published |= {name: part.detach().cpu().clone() for name, part in zip(entry.theirs, parts)}
    return published


def tied(state: Mapping[str, Tensor], copies: Mapping[str, str], source: str) -> dict[str, str]:
    """Check tensors that are stored twice, of which each copy must equal its original.

    Parameters
    ----------
    copies
        Name of each copy to the name of its original. Copies that are not in `state` are skipped.

    Returns
    -------
    Reason for each copy, for the argument `unused` of `build_network`.
    """
    for copy, original in copies.items():
        if copy in state and (original not in state or not torch.equal(state[copy], state[original])):
            raise ModelFileError(
                f"{source}: {copy} must be equal to {original}, but is not. The model was changed after these weights were "
                "tied, or the file is damaged. Save it again with the package that wrote it."
            )
    return {copy: f"a copy of {original}" for copy, original in copies.items() if copy in state}


def read_torch(path: Path) -> Any:
    """Read a `torch.save` file that holds only tensors and plain containers, without executing code in it.

    Raises
    ------
    ModelFileError
        If the file holds other objects, or is damaged.
    """
    require_downloaded(path)
    check_torch_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the pickle protocol do not help the user
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle can raise almost any exception
        # The message of torch is not shown, because it recommends disabling the protection.
        first_line = str(error).strip().partition("\n")[0]
        reason = "" if isinstance(error, UnpicklingError) or not first_line else f" ({first_line})"
        raise ModelFileError(
            f"{path} was not opened{reason}. It is damaged or cut short, or it "
            "holds other objects than tensors and plain containers, which could run code and are refused. Copy it again, or "
            "save only its `state_dict()`."
        ) from None


def require(config: ModelConfig, settings: Mapping[str, Any], family: str) -> None:
    """Raise `ModelFileError` unless the network has the architecture of the published code of a family.

    Names of settings have dots, such as "embedding.positions".
    """
    found = {name: reduce(getattr, name.split("."), config) for name in settings}
    faults = [f"{name} is {found[name]!r}, not {value!r}" for name, value in settings.items() if found[name] != value]
    if faults:
        raise ModelFileError(
            f"This model cannot be written as {family}, whose code does not support these settings:\n  "
            + "\n  ".join(faults)
        )
