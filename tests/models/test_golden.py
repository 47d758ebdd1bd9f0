"""Files of every past format version stay readable, and mean what they meant."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scfm
from scfm.models.state import Calibration

GOLDEN = Path(__file__).with_name("golden")
# First three columns of the embeddings, and probabilities of the first class, as the version that wrote the file gave them.
EMBEDDING = [
    [0.10018, -0.24988, -0.04906],
    [0.11989, -0.12404, -0.06712],
    [0.09694, -0.08204, -0.0025],
    [0.13126, -0.32998, 0.03379],
]
PROBABILITY = [0.50299, 0.49955, 0.50021, 0.50293]
CALIBRATED = [0.50598, 0.49911, 0.50041, 0.50585]
OF_ENSEMBLE = [0.27073, 0.26879, 0.26292, 0.2772]


@pytest.fixture
def adata():
    counts = np.random.default_rng(0).poisson(1.0, (4, 40)).astype(np.float32)
    genes = pd.DataFrame(index=[f"GENE{place}" for place in range(40)])
    return anndata.AnnData(sparse.csr_matrix(counts), var=genes)


def test_format_1_is_read_and_gives_the_same_numbers(adata):
    model = scfm.load(GOLDEN / "format_1")
    assert model.labels == ("A", "B")
    assert model.history == {"preset": "golden"}
    cells = scfm.pp.encode(adata, model)
    assert cells.gene_ids_T[:8].tolist() == [5, 6, 13, 17, 9, 12, 2, 14]
    np.testing.assert_allclose(model.embed(cells)[:, :3], EMBEDDING, atol=2e-5)
    np.testing.assert_allclose(model.predict_proba(cells)[:, 0], PROBABILITY, atol=2e-5)


def test_format_2_is_read_and_gives_the_same_numbers(adata):
    model = scfm.load(GOLDEN / "format_2")
    assert (model.labels, model.objective, model.history) == (("A", "B"), "masked_genes", {"preset": "golden"})
    assert model.calibration == Calibration(n_cells=20, transformer_temperature=0.5, ensemble_temperature=2.0)
    assert model.scores == [{"method": "scfm", "accuracy": 0.75, "macro_f1": 0.5}]
    assert model.encoding.vocabulary.aliases == {"OLD0": "GENE0"}
    cells = scfm.pp.encode(adata, model)
    np.testing.assert_allclose(model.embed(cells)[:, :3], EMBEDDING, atol=2e-5)
    np.testing.assert_allclose(model.predict_proba(cells)[:, 0], CALIBRATED, atol=2e-5)
    expression = scfm.pp.log_expression(adata, model)
    np.testing.assert_allclose(model.predict_proba(cells, expression)[:, 0], OF_ENSEMBLE, atol=2e-5)


def test_format_3_is_read_with_its_novelty_score(adata):
    model = scfm.load(GOLDEN / "format_3")
    assert model.calibration == Calibration(
        n_cells=20, transformer_temperature=0.5, ensemble_temperature=2.0, novelty_threshold=1.5
    )
    expression = scfm.pp.log_expression(adata, model)
    np.testing.assert_allclose(
        model.predict_proba(scfm.pp.encode(adata, model), expression)[:, 0], OF_ENSEMBLE, atol=2e-5
    )
    components = expression.toarray() @ np.linspace(-1, 1, 84).reshape(42, 2)
    nearest = [(components**2).sum(1), 0.5 * (expression.toarray() ** 2).sum(1)]
    np.testing.assert_allclose(model.network.novelty(expression), np.log(nearest).max(0), rtol=1e-5)


def test_format_4_is_read_with_the_scale_of_each_class(adata):
    model = scfm.load(GOLDEN / "format_4")
    expression = scfm.pp.log_expression(adata, model)
    components = expression.toarray() @ np.linspace(-1, 1, 84).reshape(42, 2)
    means = components[:2] + 0.5  # the classes of the file have equal means
    model.network.novelty.mean_CR.copy_(torch.from_numpy(means))
    squared = ((components[:, None] - means) ** 2).sum(2)
    first = (np.log(squared.min(1)) - np.array([0.1, 0.3])[squared.argmin(1)]) / np.array([1, 3])[squared.argmin(1)]
    second = (np.log(0.5 * (expression.toarray() ** 2).sum(1)) - 0.2) / 2  # equal distances: the first class
    assert set(squared.argmin(1)) == {0, 1}
    np.testing.assert_allclose(model.network.novelty(expression), np.maximum(first, second), rtol=1e-5)


def test_what_was_read_can_be_written_again(adata, tmp_path):
    model = scfm.load(GOLDEN / "format_1")
    model.save(tmp_path / "again")
    again, cells = scfm.load(tmp_path / "again"), scfm.pp.encode(adata, model)
    assert np.array_equal(again.embed(cells), model.embed(cells))
