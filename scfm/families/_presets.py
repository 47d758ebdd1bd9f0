"""Find presets by name, size and encoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from scfm.families.base import FAMILIES, Preset

if TYPE_CHECKING:
    import pandas as pd


def presets() -> Iterator[Preset]:
    """Iterate over the presets of all families: first the published ones, then scfm's sizes.

    Examples
    --------
    >>> from scfm import families
    >>> "scbert" in [preset.name for preset in families.presets()]
    True
    """
    for family in FAMILIES.values():
        yield from family.presets


def preset(name: str) -> Preset:
    """Return a preset by its name; `table()` lists all presets.

    Parameters
    ----------
    name
        Name in `table()`.

    Raises
    ------
    ValueError
        If no preset has this name.

    Examples
    --------
    >>> from scfm import families
    >>> families.preset("scgpt-human").network["d_model"]
    512
    """
    named = {entry.name: entry for entry in presets()}
    if name not in named:
        raise ValueError(f"`preset` is {name!r}; choose one of {', '.join([*sizes(), *named])}.")
    return named[name]


def sizes() -> list[str]:
    """Return the names of the sizes, which exist for several encodings: "small", "medium", "large".

    Examples
    --------
    >>> import scfm
    >>> scfm.families.sizes()
    ['small', 'medium', 'large']
    """
    return list(dict.fromkeys(entry.size for entry in presets() if entry.size is not None))


def choose_preset(name: str, *, encoding: str | None = None, objective: str | None = None) -> Preset:
    """Find a preset by name or size.

    Parameters
    ----------
    name
        A size ("small", "medium", "large"), or the name of any preset.
    encoding
        Kind of encoding. Sizes exist for "rank" (the default) and "bin"; every other preset has one kind.
    objective
        "masked", "generative" or "profile". None for the default of the preset.

    Raises
    ------
    ValueError
        If there is no such preset, or it does not have this encoding or objective.

    Examples
    --------
    >>> from scfm import families
    >>> families.choose_preset("small", encoding="bin", objective="generative").name
    'small-bin'
    """
    candidates = [entry for entry in presets() if entry.size == name] or [preset(name)]
    found = [entry for entry in candidates if encoding in (None, entry.encoding["kind"])]
    if not found:
        have = ", ".join(repr(entry.encoding["kind"]) for entry in candidates)
        raise ValueError(
            f"`encoding` is {encoding!r}, but the preset {name!r} has {have}. Omit it, or choose another preset: "
            f"{', '.join(each.name for each in presets() if each.encoding['kind'] == encoding) or 'none has it'}."
        )
    return found[0] if objective is None else found[0].for_objective(objective)


def table(*, n_genes: int = 20_000) -> pd.DataFrame:
    """Return a table of all presets: family, parameters, layers, width, context length, encoding, objective, source.

    Parameters
    ----------
    n_genes
        Number of genes that is used to count the parameters of presets without a vocabulary.

    Examples
    --------
    >>> from scfm import families
    >>> int(families.table().loc["geneformer-v1-10m", "context_length"])
    2048
    """
    import pandas as pd

    rows = [
        {
            "preset": entry.name,
            "family": entry.family,
            "parameters": entry.n_parameters(entry.n_tokens or n_genes),
            "layers": entry.network["n_layers"],
            "width": entry.network["d_model"],
            "context_length": entry.network["context_length"],
            "encoding": entry.encoding["kind"],
            "objective": entry.objective,
            "source": entry.source,
        }
        for entry in presets()
    ]
    return pd.DataFrame(rows).set_index("preset")
