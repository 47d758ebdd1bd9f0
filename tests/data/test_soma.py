"""Cells of TileDB-SOMA experiments are those of the AnnData that they were made from."""

import anndata
import numpy as np
import pytest

import scfm
from scfm.data import CountSource, SomaPath
from scfm.train import CellStream

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiledbsoma():
    return pytest.importorskip("tiledbsoma")


@pytest.fixture(scope="module")
def cells():
    adata = scfm.datasets.pbmc()[:200].copy()
    del adata.obsm, adata.uns
    adata.layers["logged"] = np.log1p(adata.X)
    return adata


@pytest.fixture(scope="module")
def url(tiledbsoma, cells, tmp_path_factory):
    import tiledbsoma.io

    path = str(tmp_path_factory.mktemp("soma") / "pbmc")
    tiledbsoma.io.from_anndata(path, cells, measurement_name="RNA", X_layer_name="raw")
    return f"soma://{path}"


def test_counts_columns_and_names_are_those_of_the_data(url, cells):
    counts = CountSource.of(url)
    assert counts.shape == cells.shape
    assert counts.obs_names.tolist() == cells.obs_names.tolist()
    assert counts.var.index.tolist() == cells.var_names.tolist()
    expected = cells.X.toarray()
    for size in (1, 37, 1000):
        np.testing.assert_array_equal(np.vstack([block.toarray() for _, block, _ in counts.blocks(size)]), expected)
    rows = [150, 3, 4, 5, 0]
    np.testing.assert_array_equal(counts.select(rows).rows(0, 5).toarray(), expected[rows])
    labels = scfm.data.columns.groups(scfm.data.files.obs_of(url), "bulk_labels")
    assert labels.codes.tolist() == scfm.data.columns.groups(cells.obs, "bulk_labels").codes.tolist()


def test_a_filter_selects_cells(url, cells):
    chosen = cells[cells.obs["bulk_labels"] == "Dendritic"]
    counts = CountSource.of(f"{url}?obs=bulk_labels == 'Dendritic'")
    assert counts.obs_names.tolist() == chosen.obs_names.tolist()
    np.testing.assert_array_equal(np.vstack([block.toarray() for _, block, _ in counts.blocks(9)]), chosen.X.toarray())


def test_an_experiment_trains_and_is_embedded_like_a_file(url, cells, tmp_path):
    config = scfm.FitConfig(n_steps=2, tokens_per_step=1024, accelerator="cpu")
    cells.write_h5ad(tmp_path / "pbmc.h5ad")
    runs = {
        name: scfm.pretrain(path, tmp_path / name, sampling="balanced:bulk_labels", config=config, progress=False)
        for name, path in (("soma", url), ("file", tmp_path / "pbmc.h5ad"))
    }
    assert runs["soma"].id == runs["file"].id
    for suffix in ("npy", "h5ad"):
        scfm.tl.embed_files(url, tmp_path / f"out.{suffix}", runs["soma"], progress=False)
    scfm.tl.embed(cells, runs["soma"])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), cells.obsm["X_scfm"])
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.obs["bulk_labels"].tolist() == cells.obs["bulk_labels"].tolist()
    stream = CellStream([url, tmp_path / "pbmc.h5ad"], runs["soma"].encoding, batch_cells=64)
    assert sorted(cell for batch in stream for cell in batch.cell_index_B.tolist()) == list(range(400))


def test_experiment_and_file_are_one_data_set(url, cells, tmp_path):
    cells[:, ::-1].write_h5ad(tmp_path / "pbmc.h5ad")
    counts = CountSource.of([url, str(tmp_path / "pbmc.h5ad")])
    twice = np.vstack([block.toarray() for _, block, _ in counts.blocks(64)])
    np.testing.assert_array_equal(twice, np.vstack([cells.X.toarray()] * 2))


@pytest.mark.parametrize(
    ("ending", "match"),
    [
        ("?measurement=ATAC", "has no measurement 'ATAC'. It has RNA"),
        ("?obs=bulk_labels ==", "The filter 'bulk_labels ==' on `obs`"),
        ("?obs=missing == 'a'", "cannot be applied"),
        ("-other", "cannot be opened as a SOMA experiment"),
    ],
)
def test_what_cannot_be_read_is_said(url, ending, match):
    with pytest.raises(OSError, match=match):
        CountSource.of(url + ending)


def test_a_layer_is_chosen_by_name_and_must_hold_counts(url):
    with pytest.raises(scfm.errors.CountsError, match="holds fractions"):
        list(CountSource.of(url, layer="logged").blocks())


def test_urls_are_read_without_the_package():
    path = SomaPath("soma://s3://bucket/human?measurement=RNA&obs=a == 'x%26y'&vfs.s3.region=us-west-2")
    assert (path.uri, path.obs_filter) == ("s3://bucket/human", "a == 'x&y'")
    assert path.settings == {"vfs.s3.region": "us-west-2"}
    with pytest.raises(OSError, match="has the option 'mesurement'"):
        SomaPath("soma:///data/human?mesurement=RNA")
