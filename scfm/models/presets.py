"""Named settings: the published families, and sizes of our own that fit the data at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from scfm.models.config import ModelConfig

if TYPE_CHECKING:
    import pandas as pd

# What a family asks of the network, whatever its size.
__all__ = ["Preset", "choose_preset", "own_preset", "preset", "presets", "table"]

GENEFORMER_WIRING: dict[str, Any] = {
    "positions": "rank",
    "values": "none",
    "norm": "post",
    "norm_eps": 1e-12,
    "embedding_norm": True,
    "activation": "relu",
    "gene_head": True,
    "pooling": "mean",
}
SCGPT_WIRING: dict[str, Any] = {
    "positions": "none",
    "values": "continuous",
    "norm": "post",
    "norm_eps": 1e-5,
    "gene_norm": True,
    "embedding_norm": False,
    "dropout_in_feed_forward": True,
    "activation": "relu",
    "gene_head": False,
    "value_head": "mlp",
    "value_from_cell_head": True,
    "pooling": "cls",
    "normalize_embedding": True,
}
SCBERT_WIRING: dict[str, Any] = {
    "positions": "none",
    "values": "bucket",
    "n_value_bins": 7,
    "attention": "linear",
    "qkv_bias": False,
    "norm": "pre",
    "norm_eps": 1e-5,
    "final_norm": True,
    "embedding_norm": False,
    "activation": "gelu",
    "gene_head": False,
    "value_head": "bucket",
    "train_gene_embedding": False,
    "dropout": 0.0,
    "pooling": "mean",
}
SCFOUNDATION_WIRING: dict[str, Any] = {
    "positions": "none",
    "values": "soft_bins",
    "n_value_bins": 100,
    "norm": "post",
    "norm_eps": 1e-5,
    "final_norm": True,
    "embedding_norm": False,
    "dropout_in_feed_forward": True,
    "activation": "relu",
    "gene_head": False,
    "value_head": "linear",
    "dropout": 0.1,
    "pooling": "concat",
}
# Ours: the wiring of a family, with what small data asks for.
WIRING: dict[str, dict[str, Any]] = {
    "rank": GENEFORMER_WIRING,
    "bin": SCGPT_WIRING | {"normalize_embedding": False, "value_from_cell_head": False},
}

OBJECTIVES = ("masked", "generative")  # what a user can ask for; each family has its own way of masking
SIZES: dict[str, dict[str, int]] = {
    "small": {"d_model": 128, "n_heads": 4, "n_layers": 3, "d_ff": 256},
    "medium": {"d_model": 256, "n_heads": 8, "n_layers": 6, "d_ff": 512},
    "large": {"d_model": 512, "n_heads": 8, "n_layers": 12, "d_ff": 1024},
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named setting of the network, its encoding and its objective.

    Attributes
    ----------
    family
        Whose way it is: "geneformer", "scgpt", "scbert", "scfoundation" or "scfm".
    encoding
        Fields of `EncodingConfig`.
    network
        Fields of `ModelConfig`, without those that follow from the vocabulary.
    objective
        Name of the pretraining objective.
    n_tokens
        Length of the published vocabulary; None where it is built from the data.
    pad_id
        Row of the gene embedding that stays zero.
    source
        Where the numbers come from.

    Examples
    --------
    >>> from scfm.models import presets
    >>> geneformer = presets.preset("geneformer-v1-10m")
    >>> geneformer.encoding["kind"], geneformer.network["n_layers"]
    ('rank', 6)
    """

    name: str
    family: str
    encoding: Mapping[str, Any]
    network: Mapping[str, Any]
    objective: str
    n_tokens: int | None = None
    pad_id: int | None = 0
    source: str = ""

    def model_config(self, *, n_tokens: int | None = None, pad_id: int | None = None, **changes: Any) -> ModelConfig:
        """Complete the network's configuration for a vocabulary of `n_tokens`."""
        n_tokens = self.n_tokens if n_tokens is None else n_tokens
        if n_tokens is None:
            raise ValueError(f"The preset {self.name!r} has no vocabulary of its own; pass `n_tokens`.")
        pad_id = self.pad_id if pad_id is None else pad_id
        return ModelConfig(**{**self.network, "n_tokens": n_tokens, "pad_id": pad_id, **changes})

    def for_objective(self, objective: str) -> Preset:
        """Return the preset as it is pretrained on "masked" or "generative".

        Raises
        ------
        ValueError
            If the objective is another, or generative for an encoding that is not bin.
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` is {objective!r}; choose one of {', '.join(OBJECTIVES)}.")
        kind = self.encoding["kind"]
        if objective == "masked":
            masked = {"rank": "masked_genes", "bin": "masked_values", "bucket": "masked_buckets"}
            return replace(self, objective=masked.get(kind, self.objective))
        if kind != "bin":
            raise ValueError(
                f"`objective` is 'generative' and the encoding {kind!r}: generation predicts binned values, which this "
                "encoding has not. Choose encoding='bin' (preset 'scgpt-human' has it), or objective='masked'."
            )
        return replace(self, objective="generative", network={**self.network, "value_from_cell_head": True})

    def n_parameters(self, n_tokens: int | None = None) -> int:
        """Count the network's parameters without allocating them."""
        from scfm.models.network import CellTransformer

        with torch.device("meta"):
            network = CellTransformer(self.model_config(n_tokens=n_tokens))
        return sum(parameter.numel() for parameter in network.parameters())


def own_preset(size: str, encoding: str) -> Preset:
    """One of our sizes ("small", "medium", "large") wired for an encoding ("rank", "bin").

    Parameters
    ----------
    size
        "small", "medium" or "large".
    encoding
        "rank" or "bin".

    Raises
    ------
    ValueError
        If there is no such size or no wiring for the encoding.

    Examples
    --------
    >>> from scfm.models import presets
    >>> presets.own_preset("small", "bin").objective
    'masked_values'
    """
    if size not in SIZES:
        raise ValueError(f"`preset` is {size!r}; choose one of {', '.join(SIZES)}.")
    if encoding not in WIRING:
        raise ValueError(f"`encoding` is {encoding!r}; choose one of {', '.join(WIRING)}.")
    return Preset(
        name=f"{size}-{encoding}",
        family="scfm",
        encoding={"kind": encoding, "context_length": 1024, "add_cls": encoding == "bin"},
        network={**WIRING[encoding], **SIZES[size], "context_length": 1024, "dropout": 0.1},
        objective="masked_genes" if encoding == "rank" else "masked_values",
    )


def _geneformer(name: str, layers: int, width: int, heads: int, d_ff: int, *, v2: bool) -> Preset:
    context = 4096 if v2 else 2048
    specials = {"add_cls": True, "add_eos": True, "duplicates": "sum"} if v2 else {}
    return Preset(
        name=name,
        family="geneformer",
        encoding={"kind": "rank", "context_length": context, **specials},
        network={
            **GENEFORMER_WIRING,
            "n_layers": layers,
            "d_model": width,
            "n_heads": heads,
            "d_ff": d_ff,
            "context_length": context,
            "dropout": 0.1 if v2 else 0.02,
            "n_token_types": 2,
            "pooling": "cls" if v2 else "mean",
            "embedding_layer": -2,
        },
        objective="masked_genes",
        n_tokens=20_275 if v2 else 25_426,
        source="Chen et al. 2024" if v2 else "Theodoris et al. 2023",
    )


PUBLISHED: tuple[Preset, ...] = (
    _geneformer("geneformer-v1-10m", 6, 256, 4, 512, v2=False),
    _geneformer("geneformer-v1-12l", 12, 512, 8, 1024, v2=False),
    _geneformer("geneformer-v2-104m", 12, 768, 12, 3072, v2=True),
    _geneformer("geneformer-v2-316m", 18, 1152, 18, 4608, v2=True),
    Preset(
        name="scgpt-human",
        family="scgpt",
        encoding={"kind": "bin", "context_length": 1200, "n_bins": 51, "add_cls": True},
        network={
            **SCGPT_WIRING,
            "n_layers": 12,
            "d_model": 512,
            "n_heads": 8,
            "d_ff": 512,
            "context_length": 1200,
            "dropout": 0.2,
            "unknown_tokens": "flag",
        },
        objective="generative",
        n_tokens=60_697,
        pad_id=60_694,
        source="Cui et al. 2024",
    ),
    Preset(
        name="scbert",
        family="scbert",
        encoding={"kind": "bucket"},
        network={
            **SCBERT_WIRING,
            "n_layers": 6,
            "d_model": 200,
            "n_heads": 10,
            "head_width": 64,
            "d_ff": 800,
            "context_length": 16_907,
        },
        objective="masked_buckets",
        n_tokens=16_907,
        pad_id=None,
        source="Yang et al. 2022",
    ),
    Preset(
        name="scfoundation",
        family="scfoundation",
        encoding={"kind": "continuous"},
        network={
            **SCFOUNDATION_WIRING,
            "n_layers": 12,
            "d_model": 768,
            "n_heads": 12,
            "d_ff": 3072,
            "decoder_layers": 6,
            "context_length": 19_266,
        },
        objective="read_depth",
        n_tokens=19_267,
        pad_id=None,
        source="Hao et al. 2024",
    ),
)


def presets() -> Iterator[Preset]:
    """Every preset: the published ones, then our own sizes.

    Examples
    --------
    >>> from scfm.models import presets
    >>> "scbert" in [preset.name for preset in presets.presets()]
    True
    """
    yield from PUBLISHED
    yield from (own_preset(size, encoding) for encoding in WIRING for size in SIZES)


def preset(name: str) -> Preset:
    """One preset by its name; `table()` lists them.

    Parameters
    ----------
    name
        As `table()` lists it.

    Raises
    ------
    ValueError
        If there is none of this name.

    Examples
    --------
    >>> from scfm.models import presets
    >>> presets.preset("scgpt-human").network["d_model"]
    512
    """
    named = {entry.name: entry for entry in presets()}
    if name not in named:
        raise ValueError(f"`preset` is {name!r}; choose one of {', '.join([*SIZES, *named])}.")
    return named[name]


def choose_preset(name: str, *, encoding: str | None = None, objective: str | None = None) -> Preset:
    """Find a preset by what a user says of it.

    Parameters
    ----------
    name
        One of our sizes ("small", "medium", "large"), or the name of any preset.
    encoding
        "rank" or "bin" for one of our sizes, None for rank; of other presets their own, or None.
    objective
        "masked" or "generative"; None for the preset's own.

    Raises
    ------
    ValueError
        If there is no such preset, or its encoding is another, or does not serve the objective.

    Examples
    --------
    >>> from scfm.models import presets
    >>> presets.choose_preset("small", encoding="bin", objective="generative").name
    'small-bin'
    """
    if name in SIZES:
        found = own_preset(name, encoding or "rank")
    else:
        found = preset(name)
        if encoding not in (None, found.encoding["kind"]):
            raise ValueError(
                f"`encoding` is {encoding!r}, but the preset {name!r} has {found.encoding['kind']!r}. Leave it out, or "
                f"choose one of the sizes {', '.join(SIZES)}, which can have either."
            )
    return found if objective is None else found.for_objective(objective)


def table(*, n_genes: int = 20_000) -> pd.DataFrame:
    """List every preset: family, parameters, layers, width, context, encoding, objective, source; a row a preset.

    Parameters
    ----------
    n_genes
        Vocabulary to count parameters with where a preset has none of its own.

    Examples
    --------
    >>> from scfm.models import presets
    >>> int(presets.table().loc["geneformer-v1-10m", "context_length"])
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
