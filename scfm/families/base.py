"""`Family` and `Preset`: the definition of a model family and its named sizes, and the registry of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from scfm._registry import Registry
from scfm.errors import ModelFileError
from scfm.families._checkpoint import CheckpointFiles
from scfm.models.config import ModelConfig
from scfm.models.io.dictionaries import Source
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.models.shapes import shapes_only
from scfm.objectives.base import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named setting of the network, its encoding and its objective.

    Attributes
    ----------
    name
        Name of the preset.
    family
        Name of its family.
    encoding
        Fields of `EncodingConfig`.
    network
        Fields of `ModelConfig`, without those that follow from the vocabulary; a group as a mapping of its fields.
    objective
        Name of the pretraining objective.
    objectives
        Names in `scfm.objectives.OBJECTIVES` of the objectives that "masked", "generative" and "profile" select.
    size
        "small", "medium" or "large" for a size that exists with several encodings.
    n_tokens
        Length of the published vocabulary; None if it is built from the data.
    pad_id
        Id of the padding token, whose embedding stays zero.
    source
        Where the numbers come from.

    Examples
    --------
    >>> from scfm import families
    >>> geneformer = families.preset("geneformer-v1-10m")
    >>> geneformer.encoding["kind"], geneformer.network["n_layers"]
    ('rank', 6)
    """

    name: str
    family: str
    encoding: Mapping[str, Any]
    network: Mapping[str, Any]
    objective: str
    objectives: Mapping[str, str] = field(default_factory=dict)
    size: str | None = None
    n_tokens: int | None = None
    pad_id: int | None = 0
    source: str = ""

    def model_config(self, *, n_tokens: int | None = None, pad_id: int | None = None, **changes: Any) -> ModelConfig:
        """Return the configuration of the network for `n_tokens` tokens, with changed fields, also of groups."""
        n_tokens = self.n_tokens if n_tokens is None else n_tokens
        if n_tokens is None:
            raise ValueError(f"The preset {self.name!r} has no fixed vocabulary. Pass `n_tokens`.")
        pad_id = self.pad_id if pad_id is None else pad_id
        settings = merged(self.network, OBJECTIVES[self.objective].network_settings, changes)
        return ModelConfig.from_dict({**settings, "n_tokens": n_tokens, "pad_id": pad_id})

    def for_objective(self, objective: str) -> Preset:
        """Return the preset for pretraining with the objective "masked", "generative" or "profile".

        Raises
        ------
        ValueError
            If the objective is unknown, or this preset does not have it.
        """
        if objective not in self.objectives:
            every = [each for family in FAMILIES.values() for each in family.presets]
            able = [each.name for each in every if objective in each.objectives]
            known = list(dict.fromkeys(name for each in every for name in each.objectives))
            if not able:
                raise ValueError(f"`objective` is {objective!r}; choose one of {', '.join(known)}.")
            sizes = [each.encoding["kind"] for each in every if each.size == self.size and each.name in able]
            remedy = f"Choose encoding={sizes[0]!r}" if sizes else f"Choose one of the presets {', '.join(able)}"
            raise ValueError(
                f"`objective` is {objective!r}, which does not exist for the {self.encoding['kind']!r} encoding of "
                f"{self.name!r}. {remedy}, or objective={next(iter(self.objectives))!r}."
            )
        return replace(self, objective=self.objectives[objective])

    def n_parameters(self, n_tokens: int | None = None) -> int:
        """Return the number of parameters of the network, without allocating them."""
        with shapes_only():
            network = CellTransformer(self.model_config(n_tokens=n_tokens))
        return sum(parameter.numel() for parameter in network.parameters())


class Reader(Protocol):
    """Builds a model from the files of a checkpoint; the arguments are described in `scfm.load`."""

    def __call__(
        self, files: CheckpointFiles, *, vocabulary: Source | None, medians: Source | None, strict: bool
    ) -> Model: ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: its encoding, the architecture of its network, and the format of its checkpoints.

    To add a family, define it in a new file in `scfm/families` (or elsewhere) and call `scfm.families.add_family`.

    Attributes
    ----------
    name
        Name under which it is registered.
    layout
        Short description of its checkpoints, such as "an scGPT directory (args.json)".
    encoding
        Fields of `EncodingConfig` that all its models share.
    architecture
        Fields of `ModelConfig` that all its models share.
    presets
        Named sizes.
    objectives
        Names in `scfm.objectives.OBJECTIVES` of the objectives that "masked" and, if supported, "generative" select.
    files
        Patterns of the files of a model in its folder of a hub repository.
    shared_files
        Patterns of files that all models of a hub repository share, such as vocabularies.
    recognize
        Function that takes the files of a checkpoint, and returns whether they belong to this family.
    read
        Function that takes the files of a checkpoint and returns a `Model`.
    write
        Function that takes a `Model` and a path, and writes a checkpoint of this family.

    Examples
    --------
    >>> from scfm.families import FAMILIES
    >>> FAMILIES["geneformer"].encoding["kind"], FAMILIES["scbert"].architecture["attention"]["kind"]
    ('rank', 'linear')
    """

    name: str
    layout: str
    encoding: Mapping[str, Any]
    architecture: Mapping[str, Any]
    presets: tuple[Preset, ...]
    objectives: Mapping[str, str]
    files: tuple[str, ...]
    recognize: Callable[[CheckpointFiles], bool]
    read: Reader
    write: Callable[[Model, Path], None]
    shared_files: tuple[str, ...] = ()


FAMILIES: Registry[Family] = Registry(
    "family", "scfm.families", first=("geneformer", "scgpt", "scbert", "scfoundation", "scfm")
)


def add_family(family: Family) -> Family:
    """Register a family under its name."""
    return FAMILIES.add(family.name, family)


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fields of `ModelConfig`. Later settings replace earlier ones; in a group, only the fields that they contain.

    Parameters
    ----------
    settings
        Mappings of field names to values; a group of fields is a mapping itself.

    Examples
    --------
    >>> from scfm.families.base import merged
    >>> merged({"norm": "pre", "heads": {"genes": True}}, {"heads": {"values": "mlp"}})
    {'norm': 'pre', 'heads': {'genes': True, 'values': 'mlp'}}
    """
    result: dict[str, Any] = {}
    for each in settings:
        for name, value in each.items():
            is_group = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
            result[name] = {**result[name], **value} if is_group else value
    return result


def refuse_medians(files: CheckpointFiles, medians: Source | None) -> None:
    """Raise `ModelFileError` if medians are given for a checkpoint of a family without them."""
    if medians is not None:
        raise ModelFileError(f"{files} is a checkpoint of a family without medians. Do not pass `medians`.")
