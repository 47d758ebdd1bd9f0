"""`scfm.pp.check`: what a model would make of the data, before anything is run."""

from __future__ import annotations

import html
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm._docs import document
from scfm.data.matrix import CountMatrix
from scfm.encoding.base import Encoding
from scfm.encoding.genes import GeneMap, GeneReport, gene_names, guess_species
from scfm.errors import CountsError, VocabularyMismatchError
from scfm.pp._encode import encoding_of
from scfm.vocab import guess_id_type

Verdict = Literal["ok", "note", "problem"]

# Cells are judged by a sample in runs spread over the data, so that a file on disk is read in few places.
_SAMPLE_RUNS, _RUN_ROWS = 8, 250


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, what was found, and whether it is all right."""

    what: str
    found: str
    verdict: Verdict = "ok"


@dataclass
class DataCheck:
    """What `scfm.pp.check` found; prints as a table.

    Attributes
    ----------
    n_cells, n_genes
        Size of the matrix.
    raw_counts
        Whether the matrix holds raw counts.
    counts_elsewhere
        Other places of the AnnData where raw counts seem to be.
    genes
        How genes and vocabulary fit; None where they do not.
    depth
        Quartiles of the total counts of a cell; None without raw counts.
    duplicated_names
        Number of names that come more than once.
    empty_share
        Share of cells without a known gene.
    tokens_per_cell
        Median number of tokens.
    truncated_share
        Share of cells with more genes than fit the context.
    memory_bytes, encode_seconds
        What encoding all cells would take.
    findings
        The lines of the table.
    """

    n_cells: int
    n_genes: int
    raw_counts: bool = False
    counts_elsewhere: list[str] = field(default_factory=list)
    genes: GeneReport | None = None
    depth: tuple[float, float, float] | None = None
    duplicated_names: int = 0
    empty_share: float | None = None
    tokens_per_cell: float | None = None
    truncated_share: float | None = None
    memory_bytes: int | None = None
    encode_seconds: float | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way."""
        return all(finding.verdict != "problem" for finding in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """The findings as a data frame: what, found, verdict."""
        return pd.DataFrame([vars(finding) for finding in self.findings], columns=["what", "found", "verdict"])

    def __str__(self) -> str:
        marks = {"ok": " ", "note": "!", "problem": "X"}
        width = max((len(finding.what) for finding in self.findings), default=0)
        lines = [f"{marks[f.verdict]} {f.what:<{width}}  {f.found}" for f in self.findings]
        return "\n".join([*lines, "ready" if self.ok else "not ready: mend the lines marked X"])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        colours = {"ok": "inherit", "note": "#b8860b", "problem": "#b22222"}
        rows = "".join(
            f'<tr style="color:{colours[f.verdict]}"><th style="text-align:left">{html.escape(f.what)}</th>'
            f'<td style="text-align:left">{html.escape(f.found)}</td></tr>'
            for f in self.findings
        )
        return f"<table><tbody>{rows}</tbody></table><p>{'ready' if self.ok else 'not ready'}</p>"

    def add(self, what: str, found: str, verdict: Verdict = "ok") -> None:
        self.findings.append(Finding(what, found, verdict))


@document
def check(
    adata: Any,
    model_or_encoding: Any,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    depth_key: str | None = None,
) -> DataCheck:
    """Check whether a model can use a data set: counts, genes, empty and long cells, memory and time.

    Nothing is raised for bad data; it is reported. At most 2,000 cells, spread over the data, are encoded.

    Parameters
    ----------
    adata
        Data in any form. It is left unchanged.
    model_or_encoding
        A model or an encoding.
    {layer}
    {gene_key}
    {depth_key}

    Returns
    -------
    A `DataCheck`: print it, or read its attributes. `ok` says whether the model can use the data.

    Examples
    --------
    >>> import scfm.datasets, scfm.encoding, scfm.pp
    >>> adata = scfm.datasets.pbmc()
    >>> scfm.pp.check(adata, scfm.encoding.make_encoding("rank", adata=adata)).ok
    True
    """
    encoding = encoding_of(model_or_encoding)
    try:
        counts = CountMatrix.from_adata(adata, layer=layer, depth_key=depth_key)
    except CountsError as error:
        report = DataCheck(n_cells=adata.n_obs, n_genes=adata.n_vars)
        report.add("counts", str(error), "problem")
        return report
    report = DataCheck(n_cells=counts.n_obs, n_genes=counts.n_vars)
    size = f"{counts.n_obs:,} cells x {counts.n_vars:,} genes in {counts.name}"
    report.add("data", size, "ok" if counts.n_obs and counts.n_vars else "problem")
    sample, depth_B = _sample(counts)
    _judge_counts(report, counts, sample, depth_B)
    genes = _judge_genes(report, counts, sample, encoding, gene_key)
    if genes is not None and report.raw_counts and sample.shape[0]:
        _judge_tokens(report, sample, depth_B, genes, encoding)
        _expect_network(report, getattr(model_or_encoding, "network", None))
    return report


def _sample(counts: CountMatrix) -> tuple[sp.csr_matrix, np.ndarray]:
    """Rows in runs spread over the matrix, unchecked, and the totals that the data name for them (or their sums)."""
    starts = np.unique(np.linspace(0, max(counts.n_obs - _RUN_ROWS, 0), _SAMPLE_RUNS).astype(int))
    stops = np.minimum([*starts[1:], counts.n_obs], starts + _RUN_ROWS)
    parts = [counts.rows(int(start), int(stop)) for start, stop in zip(starts, stops)]
    named = counts.named_depth
    depths = [
        np.asarray(part.sum(axis=1), dtype=np.float64).ravel() if named is None else named[start:stop]
        for part, start, stop in zip(parts, starts, stops)
    ]
    return sp.csr_matrix(sp.vstack(parts)), np.concatenate(depths)


def _judge_counts(report: DataCheck, counts: CountMatrix, sample: sp.csr_matrix, depth_B: np.ndarray) -> None:
    report.counts_elsewhere = counts.places_with_counts()
    try:
        counts.check(sample)
    except CountsError as error:
        report.add("counts", str(error), "problem")
        return
    report.raw_counts = True
    report.add("counts", f"raw ({sample.dtype}; judged by {sample.shape[0]:,} cells)")
    if sample.shape[0]:
        low, middle, high = np.quantile(depth_B, [0.25, 0.5, 0.75])
        report.depth = float(low), float(middle), float(high)
        source = "summed over the matrix" if counts.named_depth is None else "as named by the data"
        report.add("counts a cell", f"median {middle:,.0f}, half within {low:,.0f}..{high:,.0f} ({source})")


def _judge_genes(
    report: DataCheck, counts: CountMatrix, sample: sp.csr_matrix, encoding: Encoding, gene_key: str | None
) -> GeneMap | None:
    vocabulary = encoding.vocabulary
    try:
        names, source = gene_names(counts.var, gene_key=gene_key, id_type=vocabulary.id_type, vocabulary=vocabulary)
    except VocabularyMismatchError as error:
        report.add("genes", str(error), "problem")
        return None
    report.add("genes are named by", f"{source}: {guess_id_type(names)}, looks like {guess_species(names)}")
    report.duplicated_names = len(names) - len(set(names))
    if report.duplicated_names:
        report.add("duplicated names", f"{report.duplicated_names:,}", "note")
    totals = np.bincount(sample.indices, weights=sample.data, minlength=counts.n_vars) if report.raw_counts else None
    try:
        genes = GeneMap.from_names(
            names, vocabulary, duplicates=encoding.config.duplicates, gene_totals=totals, source=source
        )
    except VocabularyMismatchError as error:
        report.add("coverage", str(error), "problem")
        return None
    report.genes = genes.report
    share = genes.report.gene_share if genes.report.count_share is None else genes.report.count_share
    report.add("coverage", str(genes.report), "ok" if share >= 0.5 else "note")
    return genes


def _judge_tokens(
    report: DataCheck, sample: sp.csr_matrix, depth_B: np.ndarray, genes: GeneMap, encoding: Encoding
) -> None:
    config = encoding.config
    started = time.perf_counter()
    cells = encoding.encode(sample, genes, depth_B=depth_B)
    scale = report.n_cells / sample.shape[0]
    report.encode_seconds = (time.perf_counter() - started) * scale
    lengths = cells.lengths_B.numpy()
    report.tokens_per_cell = float(np.median(lengths))
    known = sp.csr_matrix(sample[:, genes.token_ids >= 0])
    expressed = np.diff(known.indptr)
    report.empty_share = float(np.mean(expressed == 0))
    report.truncated_share = 0.0 if config.max_genes is None else float(np.mean(expressed > config.max_genes))
    report.memory_bytes = int(cells.n_tokens * (4 + 4 * config.has_values) * scale)
    if report.empty_share:
        advice = "filter them out with scanpy.pp.filter_cells(adata, min_genes=1), on the known genes alone"
        report.add("empty cells", f"{report.empty_share:.2%} have no known gene: {advice}", "problem")
    report.add("tokens a cell", f"median {report.tokens_per_cell:,.0f}, most {lengths.max():,}")
    if report.truncated_share:
        text = f"{report.truncated_share:.1%} of the cells have more genes than the {config.max_genes:,} that fit"
        report.add("truncated", text, "note")
    report.add(
        "tokens of all cells", f"{report.memory_bytes / 1e6:,.1f} MB, encoded in {_seconds(report.encode_seconds)}"
    )


def _expect_network(report: DataCheck, network: Any) -> None:
    """Estimate one pass of a network over all cells: two operations a weight and token, at a measured speed."""
    if network is None or report.tokens_per_cell is None:
        return
    import torch

    vectors = {id(p) for m in network.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1 and id(p) not in vectors)
    device = next(network.parameters()).device
    left = torch.randn(1024, 1024, device=device)
    float((left @ left).sum())  # warm
    started = time.perf_counter()
    for _ in range(3):
        product = left @ left
    float(product.sum())
    speed = 3 * 2 * 1024**3 / (time.perf_counter() - started)
    seconds = 2 * weights * report.tokens_per_cell * report.n_cells / speed
    report.add("one pass of the model", f"very roughly {_seconds(seconds)} on {device.type}, attention not counted")


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
