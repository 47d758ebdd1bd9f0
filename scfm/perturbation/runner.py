"""Compute the embeddings of variants (perturbed cells), a limited number at a time, and equal variants once."""

# Axes: B cells, V variants, D model width.

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from scfm._files import atomic_write
from scfm.data import CellBatch
from scfm.models.inference import TOKENS_PER_BATCH, runs_of_tokens
from scfm.models.model import Model, Precision
from scfm.models.network import CellTransformer, Readout
from scfm.perturbation.deletions import MIN_CELL, embed_deletions, shares_first_block
from scfm.perturbation.edits import Editor, TokenCell
from scfm.perturbation.shifts import ShiftRecord
from scfm.perturbation.variants import Perturbations, cell_of, pack

VARIANTS_PER_BLOCK = 4096  # variants in memory at once, of complete cells; a run can be resumed after each block


@dataclass(frozen=True)
class Requests:
    """The variants of a block of cells: perturbation `number_V` of cell `cell_V` has index `slot_V`; each (V,), int64.

    A number -1 - g stands for the perturbation of token g alone, with which a combination is compared.
    """

    cell_V: NDArray[np.int64]
    number_V: NDArray[np.int64]
    slot_V: NDArray[np.int64]
    embedding_SD: NDArray[np.float32]


@dataclass
class VariantRunner:
    """Embeds variants; equal variants of a block are embedded once, even if they are of different cells.

    Attributes
    ----------
    precision
        "fp32", or "bf16" for blocks of the network in bfloat16.
    readout
        The vector to compute for each variant; None for the embedding.
    n_embedded
        Number of variants that were embedded so far.
    """

    model: Model
    cells: CellBatch
    perturbations: Perturbations
    editor: Editor
    precision: Precision = "fp32"
    readout: Readout | None = None
    n_embedded: int = 0
    variants_per_block: ClassVar[int] = VARIANTS_PER_BLOCK
    _slots: dict[bytes, int] = field(default_factory=dict)
    _pending: list[TokenCell] = field(default_factory=list)
    _n_pending_tokens: int = 0
    _parts: list[NDArray[np.float32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._network = self.model.network_in(self.precision).eval()
        self._readout = self.readout or self._network.embedding_readout
        self._of_all_genes = self.perturbations.tokens is None and shares_first_block(
            self._network, self.editor, self._readout
        )

    def n_of_cell(self, cell: int) -> int:
        """Return the number of perturbations that can be done in a cell."""
        tokens = cell_of(self.cells, cell)
        return len(self.perturbations.of_cell(cell, self.editor.expressed(tokens), self.editor))

    def blocks(self, n_of_cell_B: NDArray[np.int64], first: int = 0) -> Iterator[tuple[int, int, Requests]]:
        """Yield (first cell, end, results) for blocks of cells with about `variants_per_block` variants."""
        start = first
        while start < len(n_of_cell_B):
            upto = np.cumsum(n_of_cell_B[start:])
            stop = start + max(1, int(np.searchsorted(upto, self.variants_per_block, side="right")))
            yield start, stop, self.run_block(start, stop)
            start = stop

    def run_block(self, start: int, stop: int) -> Requests:
        self._slots, self._pending, self._n_pending_tokens, self._parts = {}, [], 0, []
        asked: list[tuple[int, int, int]] = []
        singles_too = self.perturbations.has_combinations()
        for cell in range(start, stop):
            tokens = cell_of(self.cells, cell)
            expressed = self.editor.expressed(tokens)
            if self._of_all_genes and len(expressed) >= MIN_CELL:
                first = self._slots_of_all_genes(tokens, len(expressed))
                asked += [(cell, gene, first + index) for index, gene in enumerate(expressed.tolist())]
                continue
            for number, genes in self.perturbations.of_cell(cell, expressed, self.editor):
                asked.append((cell, number, self._slot(self.editor.edit(tokens, genes))))
                if singles_too and len(genes) > 1:
                    for gene in genes:
                        asked.append((cell, -1 - gene, self._slot(self.editor.edit(tokens, [gene]))))
        self._flush()
        cell_V, number_V, slot_V = np.array(asked, dtype=np.int64).reshape(-1, 3).T
        parts = self._parts or [np.zeros((0, self.model.network.config.d_embedding), np.float32)]
        return Requests(cell_V, number_V, slot_V, np.concatenate(parts))

    def _slot(self, variant: TokenCell) -> int:
        digest = variant.digest()
        if digest not in self._slots:
            self._slots[digest] = self._n_slots
            self._pending.append(variant)
            self._n_pending_tokens += len(variant)
            if self._n_pending_tokens >= TOKENS_PER_BATCH:
                self._flush()
        return self._slots[digest]

    def _slots_of_all_genes(self, cell: TokenCell, n_genes: int) -> int:
        """Embed the deletions of all genes of a cell, unless it was done for an equal cell; return their first index."""
        digest = cell.digest()
        if digest not in self._slots:
            self._flush()  # indices are in the order of the parts
            self._slots[digest] = self._n_slots
            self._parts.append(embed_deletions(self._network, cell, self.editor, self._readout).cpu().numpy())
            self.n_embedded += n_genes
        return self._slots[digest]

    @property
    def _n_slots(self) -> int:
        return sum(map(len, self._parts)) + len(self._pending)

    def _flush(self) -> None:
        if self._pending:
            self._parts.append(embed_variants(self._network, self._pending, self._readout))
            self.n_embedded += len(self._pending)
            self._pending, self._n_pending_tokens = [], 0


def embed_variants(
    network: CellTransformer, variants: Sequence[TokenCell], readout: Readout | None = None
) -> NDArray[np.float32]:
    """Return a vector for each variant, (V, D), float32, by default its embedding, in batches of `TOKENS_PER_BATCH`."""
    network.eval()
    readout = readout or network.embedding_readout
    device = network.is_gene_V.device
    lengths = np.cumsum([0, *map(len, variants)])
    parts = [np.zeros((0, network.config.d_embedding), np.float32)]
    with torch.inference_mode():
        for rows in runs_of_tokens(lengths, TOKENS_PER_BATCH):
            parts.append(network.read_out(readout, pack(variants[rows]).to(device)).float().cpu().numpy())
    return np.concatenate(parts)


@dataclass(frozen=True)
class Checkpoint:
    """A file from which a run is resumed; it has the results so far, and a fingerprint of cells, model and settings."""

    path: Path
    fingerprint: str

    @classmethod
    def of(cls, path: str | Path, model: Model, cells: CellBatch, **settings: Any) -> Checkpoint:
        digest = hashlib.sha256(model.id.encode())
        digest.update(json.dumps(settings, sort_keys=True, default=repr).encode())
        for tensor in (cells.gene_ids_T, cells.values_T, cells.cu_seqlens):
            if tensor is not None:
                digest.update(tensor.numpy().data)
        return cls(Path(path), digest.hexdigest())

    def of_rank(self, rank: int, world_size: int) -> Checkpoint:
        """Return the file of one of several processes; a single process uses the file itself."""
        if world_size == 1:
            return self
        return replace(self, path=self.path.with_name(f"{self.path.name}.{rank}-of-{world_size}"))

    def save(self, record: ShiftRecord, next_cell: int) -> None:
        """Replace the file atomically, so that an interruption does not damage it."""
        with atomic_write(self.path) as temporary_path, temporary_path.open("wb") as file:
            state = {"fingerprint": np.array(self.fingerprint), "next_cell": np.array(next_cell)}
            np.savez(file, allow_pickle=False, **state, **record.to_arrays())

    def load_into(self, record: ShiftRecord) -> int:
        """Load earlier results into `record`, if there are any, and return the next cell.

        Raises
        ------
        ValueError
            If the file is from other cells, another model or other settings.
        """
        if not self.path.exists():
            return 0
        with np.load(self.path, allow_pickle=False) as arrays:
            if str(arrays["fingerprint"]) != self.fingerprint:
                raise ValueError(
                    f"`checkpoint` {str(self.path)!r} was written by a run with other cells, another model or other "
                    "settings. Remove the file, or pass another path."
                )
            record.set_arrays(arrays)
            return int(arrays["next_cell"])
