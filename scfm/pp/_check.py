"""`scfm.pp.check`: whether data can be used with a model, before anything is run."""

# Axes: B cells, G genes.

from __future__ import annotations

import dataclasses
import html
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from scfm._docs import document
from scfm.data.source import BLOCK_ROWS, CountSource
from scfm.encoding.base import Encoding
from scfm.encoding.genes import GeneMap, GeneReport
from scfm.errors import CountsError, VocabularyMismatchError
from scfm.families.loading import opened
from scfm.models.model import Model
from scfm.pp._encode import encoding_of, gene_map, n_encodable, open_counts
from scfm.pp._estimate import Estimate, estimated
from scfm.vocab import guess_id_type, guess_species

Verdict = Literal["ok", "note", "problem"]

_ENCODED_CELLS = 2000  # by which the time to encode is estimated
_HALVED_CELLS = 100  # by which the stability of the first genes is estimated
_FIRST_GENES = 64


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was checked, what was found, and whether it prevents encoding."""

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
        Other matrices of the AnnData that seem to hold raw counts.
    other_features
        Number of features that are not genes, by feature type; they are omitted.
    genes
        Report on how genes and vocabulary match; None if too few genes match.
    depth
        Quartiles of the total counts per cell; None without raw counts.
    duplicated_names
        Number of columns that repeat the gene of an earlier column.
    empty_fraction
        Fraction of cells that express no gene of the vocabulary.
    tokens_per_cell
        Median number of tokens.
    truncated_fraction
        Fraction of cells that express more genes than the context length allows.
    token_stability
        For rank encodings: how far the order of genes depends on chance. The counts of a cell are divided into two random
        halves, which are encoded. The value is the fraction of the first 64 genes of one half that are among the first 64 of
        the other, averaged over 100 cells. It is small if cells have few counts.
    memory_bytes, encode_seconds
        Estimated size of the tokens of all cells, and time to encode them.
    embed_seconds, annotate_seconds
        Estimated time of `scfm.tl.embed` and `annotate`, measured on a few cells; None without a model, or labels.
    embed_memory_bytes
        Estimated memory of `scfm.tl.embed` besides the data and the model, on the device of the model.
    findings
        The rows of `table`.
    """

    n_cells: int
    n_genes: int
    raw_counts: bool = False
    counts_elsewhere: list[str] = field(default_factory=list)
    other_features: dict[str, int] = field(default_factory=dict)
    genes: GeneReport | None = None
    depth: tuple[float, float, float] | None = None
    duplicated_names: int = 0
    empty_fraction: float | None = None
    tokens_per_cell: float | None = None
    truncated_fraction: float | None = None
    token_stability: float | None = None
    memory_bytes: int | None = None
    encode_seconds: float | None = None
    embed_seconds: float | None = None
    annotate_seconds: float | None = None
    embed_memory_bytes: int | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are cells, and `scfm.pp.encode` with default arguments will encode all of them."""
        return all(finding.verdict != "problem" for finding in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """The findings as a data frame with columns `what`, `found` and `verdict`."""
        return pd.DataFrame([vars(finding) for finding in self.findings], columns=["what", "found", "verdict"])

    def __str__(self) -> str:
        marks = {"ok": " ", "note": "!", "problem": "X"}
        width = max((len(finding.what) for finding in self.findings), default=0)
        lines = [f"{marks[f.verdict]} {f.what:<{width}}  {f.found}" for f in self.findings]
        return "\n".join([*lines, "ready" if self.ok else "not ready: fix the lines marked X"])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        colors = {"ok": "inherit", "note": "#b8860b", "problem": "#b22222"}
        rows = "".join(
            f'<tr style="color:{colors[f.verdict]}"><th style="text-align:left">{html.escape(f.what)}</th>'
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
    estimate: bool = True,
) -> DataCheck:
    """Check whether a model can use a data set: counts, genes, cells without genes or with too many, memory and time.

    Problems of the data are reported, not raised. Every cell is read once, and about 2,000 cells are encoded. To estimate the
    time for all cells, a model embeds, and if it has labels annotates, up to 64 of them for about a second.

    Parameters
    ----------
    adata
        An AnnData, the path of a file, or any other form that `scfm.data.CountSource.of` accepts. It is not changed.
    model_or_encoding
        A model (or its path) or an encoding.
    {layer}
    {gene_key}
    {depth_key}
    estimate
        Whether to estimate the time and memory of `scfm.tl.embed` and `annotate` with default settings. Other programs that
        run at the same time make the estimate too high.

    Returns
    -------
    A `DataCheck`, which can be printed. Its attribute `ok` is True if there are cells and `scfm.pp.encode` will encode all of
    them.

    Raises
    ------
    TypeError
        If `adata` or `model_or_encoding` has another type.
    OSError
        If `adata` is a file that is missing or damaged.
    ModelFileError
        If `model_or_encoding` is a path without a model.

    Examples
    --------
    >>> import scfm.datasets, scfm.encoding, scfm.pp
    >>> adata = scfm.datasets.pbmc()
    >>> scfm.pp.check(adata, scfm.encoding.make_encoding("rank", adata=adata)).ok
    True
    """
    if isinstance(model_or_encoding, (str, Path)):
        model_or_encoding = opened(model_or_encoding)
    encoding = encoding_of(model_or_encoding)
    try:
        counts = open_counts(adata, encoding, layer=layer, gene_key=gene_key, depth_key=depth_key)
    except CountsError as error:
        report = DataCheck(n_cells=getattr(adata, "n_obs", 0), n_genes=getattr(adata, "n_vars", 0))
        report.add("counts", str(error), "problem")
        return report
    report = DataCheck(n_cells=counts.n_obs, n_genes=counts.n_vars, other_features=counts.omitted)
    size = f"{counts.n_obs:,} cells x {counts.n_vars:,} genes in {counts.name}"
    report.add("data", size, "ok" if counts.n_obs and counts.n_vars else "problem")
    if counts.omitted:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in counts.omitted.items())
        report.add(
            "features left out", f"{kinds}: not genes, so they count neither as tokens nor for the depth", "note"
        )
    genes = _check_genes(report, counts, encoding)
    cells = _check_cells(report, counts, encoding, genes)
    if genes is not None:
        _report_coverage(report, genes, None if cells is None else cells.total_G)
        if estimate and isinstance(model_or_encoding, Model) and cells is not None and len(cells.n_tokens_B):
            found = estimated(
                model_or_encoding, counts, genes, n_tokens_B=cells.n_tokens_B, input_seconds=cells.seconds
            )
            _report_estimate(report, model_or_encoding, found)
    return report


def _check_genes(report: DataCheck, counts: CountSource, encoding: Encoding) -> GeneMap | None:
    try:
        names, source = counts.names(encoding.vocabulary)
        report.add("genes are named by", f"{source}: {guess_id_type(names)}, looks like {guess_species(names)}")
        given = [name for name in names if name is not None]
        if n_unnamed := len(names) - len(given):
            report.add("genes without a name", f"{n_unnamed:,}: left out, but part of the depth", "note")
        report.duplicated_names = len(given) - len(set(given))
        if report.duplicated_names:
            report.add("duplicated names", f"{report.duplicated_names:,}", "note")
    except VocabularyMismatchError as error:
        report.add("genes are named by", str(error), "problem")
        return None
    try:
        return gene_map(counts, encoding)
    except VocabularyMismatchError as error:
        report.add("coverage", str(error), "problem")
    except CountsError:
        pass  # is found again when all cells are checked
    return None


@dataclass(frozen=True, eq=False)
class _Cells:
    """Total counts of each gene, numbers of tokens of many of the cells, and seconds to read and encode all cells."""

    total_G: NDArray[np.float64]
    n_tokens_B: NDArray[np.integer]
    seconds: float


def _check_cells(report: DataCheck, counts: CountSource, encoding: Encoding, genes: GeneMap | None) -> _Cells | None:
    """Read all cells and report on them; None without raw counts."""
    report.counts_elsewhere = counts.matrices_with_counts()
    total_G, depths, lengths = np.zeros(counts.n_vars), [np.zeros(0)], [np.zeros(0, int)]
    encoded, seconds, dtype = [np.zeros(0, int)], 0.0, None
    first_read = time.perf_counter()
    shared = [np.zeros(0)]
    n_encoded, n_halved = (-(-n * BLOCK_ROWS // max(counts.n_obs, BLOCK_ROWS)) for n in (_ENCODED_CELLS, _HALVED_CELLS))
    try:
        for _, block, depth_B in counts.blocks(BLOCK_ROWS):
            dtype = block.dtype
            total_G += np.bincount(block.indices, weights=block.data, minlength=counts.n_vars)
            depths.append(depth_B)
            if genes is None:
                continue
            lengths.append(n_encodable(block, genes, encoding))
            started = time.perf_counter()
            encoded.append(encoding.encode(block[:n_encoded], genes, depth_B=depth_B[:n_encoded]).lengths_B.numpy())
            seconds += time.perf_counter() - started
            if not encoding.config.has_values:  # the order of genes is all that is read
                shared.append(_shared_by_halves(block[:n_halved], genes, encoding))
    except CountsError as error:
        report.add("counts", str(error), "problem")
        return None
    report.raw_counts = True
    n_tokens_B, read_seconds = np.concatenate(encoded), time.perf_counter() - first_read - seconds
    if not counts.n_obs:
        return _Cells(total_G, n_tokens_B, read_seconds)
    report.add("counts", f"raw ({dtype})")
    low, middle, high = np.quantile(np.concatenate(depths), [0.25, 0.5, 0.75])
    report.depth = float(low), float(middle), float(high)
    source = "summed over the matrix" if counts.named_depth is None else "as named by the data"
    report.add("counts per cell", f"median {middle:,.0f}, half within {low:,.0f}..{high:,.0f} ({source})")
    if genes is not None:
        report.encode_seconds = seconds * counts.n_obs / len(n_tokens_B)
        fractions = np.concatenate(shared)
        report.token_stability = float(fractions.mean()) if len(fractions) else None
        _report_tokens(
            report,
            encoding,
            n_expressed_B=np.concatenate(lengths),
            n_tokens_B=n_tokens_B,
        )
    return _Cells(total_G, n_tokens_B, read_seconds + (report.encode_seconds or 0.0))


def _shared_by_halves(block: sparse.csr_matrix, genes: GeneMap, encoding: Encoding) -> NDArray[np.float64]:
    """For each cell with enough genes, the fraction of the first genes that both halves of its counts agree on."""
    halves = [block.astype(np.float64), block.astype(np.float64)]
    halves[0].data = (
        np.random.default_rng(0).binomial(np.minimum(halves[0].data, 2**53).astype(np.int64), 0.5).astype(float)
    )
    halves[1].data = halves[1].data - halves[0].data
    n_special = encoding.config.n_special_tokens
    cells = [encoding.encode(half, genes, depth_B=np.ones(half.shape[0])) for half in halves]
    fractions = []
    for one, other in zip(*(each.gene_ids_T.split(each.lengths_B.tolist()) for each in cells)):
        n_first = min(_FIRST_GENES, len(one) - n_special, len(other) - n_special)
        if n_first >= _FIRST_GENES // 4:
            first = [tokens[encoding.config.add_cls :][:n_first].tolist() for tokens in (one, other)]
            fractions.append(len(set(first[0]) & set(first[1])) / n_first)
    return np.array(fractions)


def _report_coverage(report: DataCheck, genes: GeneMap, total_G: NDArray[np.float64] | None) -> None:
    """How many genes, and how many of the counts of all cells, the vocabulary has."""
    report.genes = genes.report
    if total_G is not None and total_G.sum() > 0:
        matched = float(total_G[genes.token_ids >= 0].sum() / total_G.sum())
        report.genes = dataclasses.replace(genes.report, count_fraction=matched)
    fraction = report.genes.gene_fraction if report.genes.count_fraction is None else report.genes.count_fraction
    report.add("coverage", str(report.genes), "ok" if fraction >= 0.5 else "note")


def _report_tokens(
    report: DataCheck,
    encoding: Encoding,
    *,
    n_expressed_B: NDArray[np.integer],
    n_tokens_B: NDArray[np.integer],
) -> None:
    config = encoding.config
    report.tokens_per_cell = float(np.median(n_tokens_B))
    report.empty_fraction = float(np.mean(n_expressed_B == 0))
    report.truncated_fraction = 0.0 if config.max_genes is None else float(np.mean(n_expressed_B > config.max_genes))
    report.memory_bytes = int(n_tokens_B.mean() * (4 + 4 * config.has_values) * report.n_cells)
    if report.empty_fraction:
        advice = "filter them out with scanpy.pp.filter_cells(adata, min_genes=1), after leaving out other genes"
        report.add("empty cells", f"{report.empty_fraction:.2%} express no gene of the vocabulary: {advice}", "problem")
    report.add("tokens per cell", f"median {report.tokens_per_cell:,.0f}, at most {n_tokens_B.max():,}")
    if report.token_stability is not None:
        text = f"{report.token_stability:.0%} are the same in two random halves of a cell's counts"
        report.add(f"first {_FIRST_GENES} genes", text, "ok" if report.token_stability >= 0.5 else "note")
    if report.truncated_fraction:
        text = f"{report.truncated_fraction:.1%} of the cells express more genes than the {config.max_genes:,} that fit"
        report.add("truncated", text, "note")
    report.add(
        "tokens of all cells",
        f"{report.memory_bytes / 1e6:,.1f} MB, encoded in {_seconds(report.encode_seconds or 0.0)}",
    )


def _report_estimate(report: DataCheck, model: Model, found: Estimate | None) -> None:
    if found is None:  # no cell has a gene of the model, which was reported
        return
    report.embed_seconds, report.annotate_seconds = found.embed_seconds, found.annotate_seconds
    report.embed_memory_bytes = found.memory_bytes
    device = model.device.type
    memory = f"; needs {found.memory_bytes / 1e9:,.2f} GB besides {'data and' if device == 'cpu' else 'the'} model"
    for what, seconds, more in (("embedding", found.embed_seconds, memory), ("annotating", found.annotate_seconds, "")):
        if seconds is not None:
            report.add(what, f"{_seconds(seconds)}, {report.n_cells / seconds:,.3g} cells/s on {device}{more}")


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
