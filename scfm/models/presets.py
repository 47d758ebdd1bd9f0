"""Named settings: the published families, and sizes of our own that fit the data at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scfm.models.config import ModelConfig

Wiring = Literal["rank", "bin"]

# What an encoding asks of the network, whatever its size.
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
    "pooling": "cls",
}
WIRING: dict[str, dict[str, Any]] = {"rank": GENEFORMER_WIRING, "bin": SCGPT_WIRING}

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
        Whose way it is: "geneformer", "scgpt" or "scfm".
    encoding
        Fields of `EncodingConfig`.
    network
        Fields of `ModelConfig`, without those that follow from the vocabulary.
    objective
        Name of the pretraining objective.
    n_tokens
        Length of the published vocabulary; None where it is built from the data.
    """

    name: str
    family: str
    encoding: Mapping[str, Any]
    network: Mapping[str, Any]
    objective: str
    n_tokens: int | None = None
    source: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)

    def model_config(self, *, n_tokens: int | None = None, pad_id: int | None = 0, **changes: Any) -> ModelConfig:
        """Complete the network's configuration for a vocabulary of `n_tokens`."""
        n_tokens = self.n_tokens if n_tokens is None else n_tokens
        if n_tokens is None:
            raise ValueError(f"The preset {self.name!r} has no vocabulary of its own; pass `n_tokens`.")
        return ModelConfig(**{**self.network, "n_tokens": n_tokens, "pad_id": pad_id, **changes})


def own_preset(size: str, encoding: str) -> Preset:
    """One of our sizes ("small", "medium", "large") wired for an encoding ("rank", "bin")."""
    if size not in SIZES:
        raise ValueError(f"`preset` is {size!r}; choose one of {', '.join(SIZES)}.")
    if encoding not in WIRING:
        raise ValueError(f"`encoding` is {encoding!r}; choose one of {', '.join(WIRING)}.")
    return Preset(
        name=f"{size}-{encoding}",
        family="scfm",
        encoding={"kind": encoding, "context_length": 1024, "add_cls": encoding == "bin"},
        network={**WIRING[encoding], **SIZES[size], "context_length": 1024, "dropout": 0.1},
        objective="masked",
    )
