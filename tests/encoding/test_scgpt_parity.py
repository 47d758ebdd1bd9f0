"""Our bins against scGPT's own function, taken from the installed package without importing it (it pins an old torch)."""

import ast
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from scfm.encoding import EncodingConfig, GeneMap, Vocabulary, make_encoding


@pytest.fixture(scope="module")
def published():
    """`_digitize` and `binning` of scgpt/preprocess.py, on a generator that a test can set."""
    try:
        files = importlib.metadata.files("scgpt") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the scgpt package (pip install --no-deps scgpt)")
    path = next(Path(str(file.locate())) for file in files if str(file) == "scgpt/preprocess.py")
    tree = ast.parse(path.read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in ("_digitize", "binning")]
    for node in wanted:
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
    import torch

    names = {"np": np, "torch": torch, "logger": None}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), names)
    return names["binning"]


@pytest.mark.parametrize("n_bins", [5, 51])
def test_our_bins_lie_in_the_range_that_scgpt_draws_from(published, n_bins, monkeypatch, backend):
    rng = np.random.default_rng(0)
    names = [f"G{place}" for place in range(800)]
    vocabulary = Vocabulary.from_genes(names)
    genes = GeneMap.from_names(names, vocabulary)
    config = EncodingConfig(kind="bin", n_bins=n_bins)
    seen_random = False
    for _ in range(20):
        row = rng.negative_binomial(0.5, 0.1, size=800).astype(np.float64)
        ours = make_encoding(config, vocabulary=vocabulary).encode(row[None], genes, backend=backend)
        expressed = row[ours.gene_ids_T[1:].numpy() - 4]
        ends = []
        for draw in (0.0, np.nextafter(1.0, 0.0)):
            monkeypatch.setattr(np.random, "rand", lambda size, draw=draw: np.full(size, draw))
            ends.append(published(expressed, n_bins))
        low, high = np.minimum(*ends), np.maximum(*ends)
        bins = ours.values_T[1:].numpy()
        assert ((low <= bins) & (bins <= high)).all()
        np.testing.assert_array_equal(bins[low == high], low[low == high])
        seen_random |= bool((low < high).any())
    assert seen_random


def test_equal_draws_give_equal_bins(published, monkeypatch):
    """With scGPT's generator replaced by our hash, the two agree in every bin."""
    from scfm.encoding.bin import TIE, bin_values
    from scfm.encoding.hashing import hash_pairs, to_unit

    rng = np.random.default_rng(1)
    for _ in range(50):
        row = 1.0 + rng.negative_binomial(0.5, 0.1, size=rng.integers(1, 600))
        unit = to_unit(hash_pairs(0, TIE, np.arange(len(row))))
        monkeypatch.setattr(np.random, "rand", lambda size, unit=unit: unit)
        np.testing.assert_array_equal(bin_values(row, unit, n_bins=51), published(row, 51))
