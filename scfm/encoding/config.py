"""`EncodingConfig`: the settings that determine a cell's tokens, together with vocabulary and medians."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from scfm._config import Config
from scfm.encoding.registry import ENCODINGS, EncodingClass

DuplicatePolicy = Literal["error", "sum"]
DepthOver = Literal["matrix", "vocabulary"]


LOG1P = {"rank": False, "bucket": True, "continuous": True}  # of the kinds that leave no choice
# Defaults of all encodings, unless their class has others.
COMMON_DEFAULTS = {"add_cls": False, "add_eos": False, "depth_over": "matrix", "log1p": False, "include_zeros": False}


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(Config):
    """Settings of an encoding. A field that is None gets the default of its kind when the object is built.

    Attributes
    ----------
    kind
        Name of a registered encoding: "rank", "bin", "bucket" or "continuous".
    context_length
        Maximum number of tokens of a cell, including special tokens. The default is 2,048 for rank, 1,200 for bin, and no
        limit (None) for the others.
    add_cls, add_eos
        Whether each cell starts with the `cls` token of the vocabulary, and whether it ends with the `eos` token. The last
        position of scBERT is an `eos` token.
    target_sum
        Total to which counts are normalized. By default, bin leaves counts unchanged, and the others use 10,000.
    depth_over
        Genes over which a cell's total is taken: "matrix" for all genes of the matrix (or for the depth, if the data name
        it), "vocabulary" for those in the vocabulary.
    log1p
        Whether to take log1p of the (normalized) counts before binning; for bin only, False by default. Rank takes no
        logarithm; bucket and continuous always do.
    n_bins
        Bin and bucket only: number of values, counted from 0, which means "not expressed". The mask value of scBERT is this
        number.
    include_zeros
        Whether genes with zero counts get tokens too: for bin the genes of the data, for bucket and continuous all genes
        of the vocabulary.
    cls_value, eos_value
        Values of the two special tokens. In scGPT they are -2 in pretraining and embedding, and 0 in fine-tuning.
    target_depth
        Continuous only: total count of a cell to predict for, the value of the target-depth token. None for the cell's own
        total.
    duplicates
        If several columns have the same gene: "error" to raise, or "sum" to add their counts (Geneformer V2).
    seed
        Seed of the hash that chooses among the bins of tied values.
    depth_key
        Column of `adata.obs` from which the total counts were read when the encoding was learned. For new cells the same
        column is used; if it is missing, a warning is logged. None if the rows were summed.
    keep_counts
        Rank only: whether the values of tokens are their counts. Some objectives need them during training.
    n_dispersed_genes
        Rank only: when medians are learned, offer only this number of genes, the most dispersed ones; other genes get no
        median and never become tokens. For small data, where the first tokens of a cell otherwise depend much on chance
        (`token_stability` of `scfm.pp.check`). None for all genes. Medians that are given are used as they are.

    Examples
    --------
    >>> import scfm
    >>> config = scfm.EncodingConfig(kind="bin", n_bins=51)
    >>> config.context_length, config.log1p  # as scGPT does
    (1200, False)
    """

    kind: str
    context_length: int | None = None
    add_cls: bool | None = None
    add_eos: bool | None = None
    target_sum: float | None = None
    depth_over: DepthOver | None = None
    log1p: bool | None = None
    n_bins: int | None = None
    include_zeros: bool | None = None
    cls_value: float = -2.0
    eos_value: float = 0.0
    target_depth: float | None = None
    duplicates: DuplicatePolicy = "error"
    seed: int = 0
    depth_key: str | None = None
    keep_counts: bool = False
    n_dispersed_genes: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ENCODINGS:
            raise ValueError(f"`kind` is {self.kind!r}; it must be one of {', '.join(ENCODINGS)}.")
        for name, value in {**COMMON_DEFAULTS, **self._class.defaults}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name. Later fields with their defaults are omitted, so that ids of earlier models do not change."""
        later = {"depth_key": None, "keep_counts": False, "n_dispersed_genes": None}
        return {name: value for name, value in super().to_dict().items() if name not in later or value != later[name]}

    def _check(self) -> None:
        rules = [
            ("context_length", self.context_length is None or self.context_length > self.n_special_tokens,
             f"must exceed the number of special tokens, {self.n_special_tokens}"),
            ("target_sum", self.target_sum is None or self.target_sum > 0, "must be positive"),
            ("n_bins", self.n_bins is None or self.n_bins >= 2, "must be at least 2"),
            ("n_bins", self.n_bins is None or "n_bins" in self._class.defaults, "has no effect; leave it out"),
            ("log1p", self.log1p == LOG1P.get(self.kind, self.log1p), f"is always {LOG1P.get(self.kind)}; leave it out"),
            ("target_depth", self.target_depth is None or self.target_depth > 0, "must be positive"),
            ("target_depth", self.target_depth is None or "target_depth" in self.special_roles, "has no effect; leave it out"),
            ("duplicates", self.duplicates in get_args(DuplicatePolicy), "must be 'error' or 'sum'"),
            ("depth_over", self.depth_over in get_args(DepthOver), "must be 'matrix' or 'vocabulary'"),
            ("seed", 0 <= self.seed < 2**63, "must be in 0..2^63 - 1"),
            ("keep_counts", self.is_ordered or not self.keep_counts, "must be False, because its tokens have values"),
            ("n_dispersed_genes", self.n_dispersed_genes is None or self._class.learns_medians, "has no effect; leave it out"),
            ("n_dispersed_genes", self.n_dispersed_genes is None or self.n_dispersed_genes >= 1, "must be at least 1"),
            ("include_zeros", not (self.is_ordered and self.include_zeros), "must be False, because zeros have no rank"),
        ]  # fmt: skip
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; for kind {self.kind!r} it {rule}.")

    @property
    def _class(self) -> EncodingClass:
        return ENCODINGS[self.kind]

    @property
    def special_roles(self) -> list[str]:
        """Roles of the special tokens of each cell."""
        return ["cls"] * bool(self.add_cls) + ["eos"] * bool(self.add_eos) + list(self._class.special_roles)

    @property
    def n_special_tokens(self) -> int:
        """Number of special tokens of each cell."""
        return len(self.special_roles)

    @property
    def max_genes(self) -> int | None:
        """Maximum number of genes of a cell; None if there is no limit."""
        return None if self.context_length is None else self.context_length - self.n_special_tokens

    @property
    def has_values(self) -> bool:
        """Whether tokens carry values (`CellBatch.values_T`)."""
        return self._class.has_values or self.keep_counts

    @property
    def is_ordered(self) -> bool:
        """Whether the order of a cell's tokens carries information."""
        return self._class.is_ordered
