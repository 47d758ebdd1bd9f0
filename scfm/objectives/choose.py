"""From the name of a pretraining objective to the objective that fits a network and its encoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scfm.models.network import CellTransformer
from scfm.objectives.base import Objective
from scfm.objectives.generative import Generative
from scfm.objectives.masked import MaskedBuckets, MaskedGenes, MaskedValues
from scfm.objectives.read_depth import ReadDepth

if TYPE_CHECKING:
    from scfm.encoding import Encoding

SECOND_PASS_STEPS = 1000  # published training of scGPT adds the second pass from here on


def make_objective(name: str, network: CellTransformer, encoding: Encoding) -> Objective:
    """Make the pretraining objective that a preset names.

    Parameters
    ----------
    name
        "masked_genes", "masked_values", "masked_buckets", "generative" or "read_depth", as `Preset.objective` has it.
    network
        What is trained. If it predicts values from cells too, masked values are also charged for that (MVC).
    encoding
        Whose tokens it reads: rank for masked genes, bucket for masked buckets, continuous for read depth.

    Examples
    --------
    >>> import scfm
    >>> from scfm.models.presets import own_preset
    >>> encoding = scfm.encoding.make_encoding("bin", adata=scfm.datasets.pbmc())
    >>> preset = own_preset("small", "bin").for_objective("generative")
    >>> network = scfm.models.CellTransformer.for_vocabulary(
    ...     preset.model_config(n_tokens=len(encoding.vocabulary)), encoding.vocabulary
    ... )
    >>> scfm.objectives.make_objective(preset.objective, network, encoding).unknown_shares
    (0.25, 0.5, 0.75)
    """
    is_gene_V = network.is_gene_V.cpu()
    match name:
        case "masked_genes":
            return MaskedGenes(mask_id=_special(encoding, "mask"), is_gene_V=is_gene_V)
        case "masked_values":
            return MaskedValues(is_gene_V=is_gene_V, cell_weight=float(network.value_from_cell_head is not None))
        case "masked_buckets":
            assert encoding.config.n_bins is not None  # every bucket encoding has them
            return MaskedBuckets(is_gene_V=is_gene_V, mask_bucket=encoding.config.n_bins)
        case "generative":
            return Generative(is_gene_V=is_gene_V, second_pass_from=SECOND_PASS_STEPS)
        case "read_depth":
            assert encoding.config.target_sum is not None  # every continuous encoding has one
            target_id, source_id = (_special(encoding, role) for role in ("target_depth", "source_depth"))
            return ReadDepth(
                is_gene_V=is_gene_V,
                target_id=target_id,
                source_id=source_id,
                target_sum=encoding.config.target_sum,
            )
        case _:
            raise ValueError(
                f"`name` is {name!r}; choose one of masked_genes, masked_values, masked_buckets, generative, read_depth."
            )


def _special(encoding: Encoding, role: str) -> int:
    token = encoding.vocabulary.special_id(role)
    if token is None:
        raise ValueError(
            f"The vocabulary has no {role!r} token (special: {dict(encoding.vocabulary.special)}), which this objective "
            "needs. Build it with one: `Vocabulary.from_genes(names, special=[...])`."
        )
    return token
