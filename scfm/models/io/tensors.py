"""Tensors under published names and under ours: every one is accounted for, in both directions."""

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
from scfm.vocab import Vocabulary

State = dict[str, Tensor]
log = logging.getLogger(__name__)

MIN_FITTING = 0.5  # fraction of the tensors without which a checkpoint is that of another model
WRAPPERS = ("module.", "_orig_mod.")


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
    """Build a network from published tensors, all or none.

    Parameters
    ----------
    config
        Settings that the checkpoint names.
    vocabulary
        Its tokens.
    state
        Published tensors by name.
    mappings
        The published names of each tensor of the network; together they must cover all of them.
    source
        Name of the checkpoint in errors.
    unused
        Published tensors that are rightly left out, and why.
    strict
        False to load the tensors that fit, and warn with the list of the others.

    Returns
    -------
    The network, and the published names that were not loaded, with the reason.

    Raises
    ------
    ModelFileError
        With every missing, unknown and misshapen tensor; also with `strict=False` if most tensors do not fit, or if values
        are not finite. No memory is allocated for the network until everything was compared.
    """
    unused, mappings = dict(unused or {}), list(mappings)
    named = {name for entry in mappings for name in entry.theirs}
    if len(set(named) & set(state)) < MIN_FITTING * len(named):
        raise _nothing_fits(source, state, named)
    with torch.device("meta"):
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
            f"{source} does not fit the network that its configuration names, and nothing was loaded:\n  {_listed(faults)}\n"
            f"Check that the files belong together, or load the {len(fitting)} of {len(mappings)} tensors that fit with "
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
    """Remove the prefix that `DataParallel`, `DistributedDataParallel` or `torch.compile` put on every name, with a warning.

    Raises
    ------
    ModelFileError
        If this is not a dictionary of tensors.
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
        f"{source} holds other tensors than the network that its configuration names: {len(set(named) & set(state))} of "
        f"{len(named)} names are there, and fewer than half fit (in the file: {', '.join(list(state)[:3])}, ...; expected: "
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
    """Give a network's tensors their published names: the inverse of `build_network`, bitwise."""
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
    Reasons for `build_network`.
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
