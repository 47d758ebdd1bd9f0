"""The data of `scfm.fit`, and the model that it starts from: a new one, or a copy of a given one."""

# Axes: B cells, G genes of the data, V tokens of the vocabulary, R components.

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scfm import pp
from scfm.annotation.finetune import Cells
from scfm.annotation.splits import FitSplit
from scfm.data import CountSource
from scfm.data.matrices import sum_columns
from scfm.encoding import Encoding, EncodingConfig, make_encoding
from scfm.families import Preset
from scfm.models.extend import extend_network, extended_encoding, extended_vocabulary
from scfm.models.initialize import sample_rows, singular_vectors
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.objectives import OBJECTIVES
from scfm.pp._encode import gene_map, open_counts
from scfm.pp._expression import log_normalized_counts
from scfm.train.loadings import residual_loadings

logger = logging.getLogger(__name__)

CONTEXT_LENGTH_TO_ANNOTATE = 128  # more genes do not change the predictions of the ensemble in our benchmarks


@dataclass(frozen=True)
class FitCounts:
    """The counts of the data, an AnnData or a file, and encodings and cells made from them."""

    adata: Any
    layer: str | None
    gene_key: str | None
    depth_key: str | None

    @property
    def source(self) -> dict[str, Any]:
        return {"layer": self.layer, "gene_key": self.gene_key, "depth_key": self.depth_key}

    def make_encoding(self, settings: EncodingConfig, rows: NDArray[np.int64], vocabulary: Any = None) -> Encoding:
        counts = CountSource.of(self.adata, **self.source, usual_depth_key=settings.depth_key)
        return make_encoding(settings, adata=counts.select(rows), vocabulary=vocabulary)

    def with_depth(self, encoding: Encoding) -> Encoding:
        """The encoding, with the column that these data read the depth of their cells from."""
        depth_key = open_counts(self.adata, encoding, **self.source).depth_key
        return encoding if depth_key in (None, encoding.config.depth_key) else encoding.replace(depth_key=depth_key)

    def genes_outside(self, encoding: Encoding) -> _MissingGenes:
        """Find the genes that have counts but no token."""
        counts = CountSource.of(self.adata, **self.source)
        total_G = np.zeros(counts.n_vars)
        for _, block, _ in counts.blocks():
            total_G += np.asarray(block.sum(0), dtype=np.float64).ravel()
        genes = gene_map(counts, encoding)
        names, _ = counts.names(encoding.vocabulary)
        outside = np.flatnonzero((genes.token_ids < 0) & (total_G > 0))
        fraction = float(total_G[outside].sum() / max(total_G.sum(), 1.0))
        return _MissingGenes(
            tuple(dict.fromkeys(name for column in outside if (name := names[column]) is not None)), fraction
        )

    def blocks(self, encoding: Encoding, rows: NDArray[np.int64]) -> Iterator[sparse.csr_matrix]:
        """Return raw counts of cells by token id, in blocks."""
        counts = CountSource.of(self.adata, **self.source).select(rows)
        token_G = gene_map(counts, encoding).token_ids
        for _, block, _ in counts.blocks():
            yield sum_columns(block, token_G, len(encoding.vocabulary))

    def cells(self, encoding: Encoding, split: FitSplit) -> Cells:
        tokens = pp.encode(self.adata, encoding, **self.source)
        counts = open_counts(self.adata, encoding, **self.source)
        return Cells(tokens, lambda rows: pp.log_expression(counts.select(rows), encoding), split)

    def expression(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return log1p of counts per 10,000 by gene of the data of some cells."""
        return log_normalized_counts(CountSource.of(self.adata, **self.source).select(rows))


@dataclass(frozen=True)
class _MissingGenes:
    """Genes of the data that are not in the vocabulary, and the fraction of all counts that is in them."""

    names: tuple[str, ...]
    count_fraction: float

    def __str__(self) -> str:
        return (
            f"{len(self.names):,} genes of the data ({self.count_fraction:.1%} of the counts) are not in the vocabulary of the "
            f"model and are ignored, such as {', '.join(self.names[:3])}. `extend_vocabulary=True` adds them."
        )


def new_model(
    counts: FitCounts, chosen: Preset, settings: EncodingConfig, *, split: FitSplit, seed: int
) -> tuple[Model, Cells]:
    """Learn an encoding, and build a network whose gene embeddings are initialized with loadings on principal components."""
    encoding = counts.make_encoding(settings, split.fitted)
    cells = counts.cells(encoding, split)
    vocabulary, context_length = encoding.vocabulary, encoding.config.context_length
    shape: dict[str, Any] = {"n_tokens": len(vocabulary), "pad_id": vocabulary.pad_id}
    shape |= {"context_length": context_length} if context_length else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CellTransformer.for_vocabulary(chosen.model_config(**shape), vocabulary)
    rows = sample_rows(split.fitted, seed)
    expression_BV = cells.expression(rows)
    totals_V = np.asarray(expression_BV.expm1().sum(0)).ravel()
    objective = OBJECTIVES[chosen.objective]
    if objective.residuals:
        loadings: NDArray[np.floating] = residual_loadings(
            lambda: counts.blocks(encoding, rows), len(vocabulary), objective.n_components, seed=seed
        )
    else:
        loadings = singular_vectors(expression_BV, objective.n_components, seed)
    objective.start(network, loadings, totals_V, seed=seed)
    history = {"preset": chosen.name, "seed": seed}
    return Model(network, encoding, objective=chosen.objective, history=history), cells


def encoding_settings(
    chosen: Preset, encoding: str | EncodingConfig | None, context_length: int | None, *, annotates: bool
) -> EncodingConfig:
    """The encoding of a new model; one for annotation reads fewer genes of a cell if nothing else is asked for."""
    if isinstance(encoding, EncodingConfig):
        settings = encoding
    else:
        settings = EncodingConfig(**chosen.encoding)
        if annotates and not settings.has_values:
            settings = settings.replace(context_length=CONTEXT_LENGTH_TO_ANNOTATE)
    return settings if context_length is None else settings.replace(context_length=context_length)


def copied_model(
    counts: FitCounts, base: Model, split: FitSplit, seed: int, *, extend_vocabulary: bool
) -> tuple[Model, Cells]:
    """Copy a model and encode the cells with its encoding; other genes are added to the vocabulary or logged."""
    network, encoding = copy.deepcopy(base.network), base.encoding
    missing = counts.genes_outside(encoding)
    if missing.names and extend_vocabulary:
        vocabulary = extended_vocabulary(encoding.vocabulary, missing.names)
        learned = counts.make_encoding(encoding.config, split.fitted, vocabulary)
        encoding = extended_encoding(encoding, vocabulary, learned)
        cells = counts.cells(encoding, split)
        rows = sample_rows(split.fitted, seed)
        network = extend_network(network, vocabulary, cells.expression(rows), seed=seed)
    else:
        encoding = counts.with_depth(encoding)
        cells = counts.cells(encoding, split)
        if missing.names:
            logger.info("%s", missing)
    history = {
        "initial_model": base.id,
        "genes_outside_vocabulary": len(missing.names),
        "counts_outside_vocabulary": missing.count_fraction,
        "stages": copy.deepcopy(base.history.get("stages", [])),
        "seed": seed,
    }
    fitted = Model(
        network,
        encoding,
        labels=base.labels,
        objective=base.objective,
        checkpoint=base.checkpoint,
        history=history,
    )
    return fitted, cells
