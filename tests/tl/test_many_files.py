"""`fit`, `perturb`, `screen` and `map_reference` on files give what they give on the concatenated AnnData."""

import itertools

import anndata
import numpy as np
import pandas as pd
import pytest

import scfm
from scfm.errors import LabelsError
from scfm.tl import _file_pass, _map_reference

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")
SHORT = scfm.FitConfig(n_steps=2, tokens_per_step=2048)
QUICK = {"config": SHORT, "pretrain": False, "baselines": False, "progress": False, "context_length": 64}


@pytest.fixture(scope="module")
def cells():
    return scfm.datasets.pbmc()[:240].copy()


@pytest.fixture(scope="module")
def files(cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    cells[:150].write_h5ad(folder / "a.h5ad")
    cells[150:].write_zarr(folder / "b.zarr")
    return [folder / "a.h5ad", folder / "b.zarr"]


@pytest.fixture(scope="module")
def model(cells):
    return scfm.fit(cells.copy(), config=SHORT, context_length=64, progress=False)


@pytest.mark.parametrize("form", ["list", "pattern", "list file", "collection"])
def test_a_fit_of_files_is_the_fit_of_their_cells(cells, files, form):
    folder = files[0].parent
    (folder / "files.txt").write_text("a.h5ad\nb.zarr\n")
    data = {
        "list": files,
        "pattern": str(folder / "*.[hz]*"),
        "list file": folder / "files.txt",
        "collection": anndata.experimental.AnnCollection([cells[:150].copy(), cells[150:].copy()]),
    }[form]
    expected = scfm.fit(cells.copy(), labels_key="bulk_labels", **QUICK)
    assert scfm.fit(data, labels_key="bulk_labels", **QUICK).id == expected.id


@pytest.mark.parametrize("form", ["backed", "lazy"])
def test_backed_and_lazy_data_are_as_good_as_data_in_memory(cells, files, model, form):
    if form == "lazy":
        pytest.importorskip("xarray")
    path = files[0].parent / "whole.h5ad"
    cells.write_h5ad(path)
    data = anndata.read_h5ad(path, backed="r") if form == "backed" else anndata.experimental.read_lazy(path)
    expected = scfm.fit(cells.copy(), labels_key="bulk_labels", **QUICK)
    assert scfm.fit(data, labels_key="bulk_labels", **QUICK).id == expected.id
    settings = {"labels_key": "bulk_labels", "n_neighbors": 4, "baselines": False}
    query, twice = cells[:50].copy(), cells[:50].copy()
    scfm.tl.map_reference(query, data, model, **settings)
    scfm.tl.map_reference(twice, cells, model, **settings)
    pd.testing.assert_frame_equal(query.obs, twice.obs)


def test_a_fit_of_files_with_other_genes_learns_all_genes(cells, files, tmp_path):
    cells[:150, 40:].write_h5ad(tmp_path / "a.h5ad")
    cells[150:, :-40].write_h5ad(tmp_path / "b.h5ad")
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    joined = anndata.concat([cells[:150, 40:], cells[150:, :-40]], join="outer", fill_value=0)
    fitted = scfm.fit(paths, config=SHORT, context_length=64, progress=False)
    expected = scfm.fit(joined, config=SHORT, context_length=64, progress=False)
    assert set(fitted.encoding.vocabulary.genes) == set(expected.encoding.vocabulary.genes)
    further = scfm.fit(paths, model=fitted, config=SHORT, progress=False)
    assert further.encoding.vocabulary == fitted.encoding.vocabulary


def test_a_label_that_one_file_lacks_is_refused(cells, files, tmp_path):
    other = cells[:20].copy()
    del other.obs["bulk_labels"]
    other.write_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(LabelsError, match=r"1 of 2 files have no column 'bulk_labels' in `obs`: c\.h5ad"):
        scfm.fit([files[0], tmp_path / "c.h5ad"], labels_key="bulk_labels", **QUICK)


def test_perturbations_of_files_are_those_of_their_cells(cells, files, model):
    settings = {"genes": ["CD74", "CST3"], "null_genes": ["GNLY", "NKG7"], "n_bootstrap": 0, "progress": False}
    for group in ({}, {"groupby": "bulk_labels", "goal": "Dendritic"}):
        expected = scfm.tl.perturb(cells, model, **settings, **group)
        pd.testing.assert_frame_equal(scfm.tl.perturb(files, model, **settings, **group), expected)
    with pytest.raises(TypeError, match="not an AnnData"):
        scfm.tl.perturb(files, model, key_added="effects", **settings)


def test_a_screen_of_files_is_that_of_their_cells(cells, files, model, tmp_path):
    few = cells[145:155].copy()
    few[:5].write_h5ad(tmp_path / "a.h5ad")
    few[5:].write_h5ad(tmp_path / "b.h5ad")
    expected = scfm.tl.screen(few, model, n_verify=3, n_bootstrap=0, progress=False)
    found = scfm.tl.screen(str(tmp_path / "*.h5ad"), model, n_verify=3, n_bootstrap=0, progress=False)
    pd.testing.assert_frame_equal(found, expected)


@pytest.fixture(scope="module")
def mapped(cells, model):
    query = cells[120:].copy()
    scfm.tl.map_reference(query, cells[:120], model, labels_key="bulk_labels", n_neighbors=4, baselines=False)
    return query


def test_a_reference_in_files_is_the_reference_in_memory(cells, files, mapped, model, tmp_path):
    cells[:70].write_h5ad(tmp_path / "a.h5ad")
    cells[70:120].write_h5ad(tmp_path / "b.h5ad")
    query = cells[120:].copy()
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    scfm.tl.map_reference(query, paths, model, labels_key="bulk_labels", n_neighbors=4)
    np.testing.assert_array_equal(query.obsm["scfm_mapped_neighbors"], mapped.obsm["scfm_mapped_neighbors"])
    pd.testing.assert_frame_equal(query.obs, mapped.obs)
    assert "scfm.tl.map_reference" in query.uns["scfm_mapped_report"].index


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".csv"])
@pytest.mark.parametrize("n_files", [1, 2])
def test_cells_of_files_are_mapped_as_in_memory(cells, mapped, model, tmp_path, suffix, n_files):
    edges = [120, 240] if n_files == 1 else [120, 180, 240]
    paths = []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        paths.append(tmp_path / f"{number}.h5ad")
        cells[start:stop].write_h5ad(paths[-1])
    out = tmp_path / f"out{suffix}"
    counts = scfm.tl.map_reference_files(
        paths, out, cells[:120], model, labels_key="bulk_labels", n_neighbors=4, progress=False
    )
    labels = mapped.obs["scfm_mapped_label"]
    assert {name: n for name, n in counts.items() if n} == labels.value_counts()[lambda found: found > 0].to_dict()
    if suffix in (".h5ad", ".zarr"):
        found = anndata.read_h5ad(out) if suffix == ".h5ad" else anndata.read_zarr(out)
        obs, neighbors = found.obs, found.obsm["scfm_mapped_neighbors"]
        distances = found.obsm["scfm_mapped_neighbor_distances"]
        assert neighbors.dtype == np.int64
        record, expected = (each.uns["scfm"]["scfm_mapped"] for each in (found, mapped))
        assert record["hub_fraction"] == pytest.approx(expected["hub_fraction"])
    else:
        obs = pd.read_parquet(out) if suffix == ".parquet" else pd.read_csv(out, index_col=0)
        neighbors = obs[[f"scfm_mapped_neighbor_{number}" for number in range(1, 5)]].to_numpy()
        distances = obs[[f"scfm_mapped_neighbor_distance_{number}" for number in range(1, 5)]].to_numpy()
    np.testing.assert_array_equal(neighbors, mapped.obsm["scfm_mapped_neighbors"])
    np.testing.assert_allclose(distances, mapped.obsm["scfm_mapped_neighbor_distances"], rtol=1e-5)
    assert obs["scfm_mapped_label"].astype(str).tolist() == labels.astype(str).tolist()
    for name in ("confidence", "distance"):
        np.testing.assert_allclose(obs[f"scfm_mapped_{name}"], mapped.obs[f"scfm_mapped_{name}"], rtol=1e-5)
    assert obs.index.tolist() == mapped.obs_names.tolist()


def test_a_mapping_that_was_stopped_resumes_and_one_with_another_reference_does_not(
    cells, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(_file_pass, "BLOCK_CELLS", 16)
    cells[120:].write_h5ad(tmp_path / "query.h5ad")
    mapper = _map_reference.Mapper
    coordinates, done = mapper.coordinates, []

    def stops(self, block, bar):
        done.append(block.first)
        if len(done) == 4:
            raise KeyboardInterrupt
        return coordinates(self, block, bar)

    def run(reference):
        done.clear()
        scfm.tl.map_reference_files(
            tmp_path / "query.h5ad", tmp_path / "out.csv", reference, model, labels_key="bulk_labels", n_neighbors=4,
            progress=False,
        )  # fmt: skip

    monkeypatch.setattr(mapper, "coordinates", stops)
    with pytest.raises(KeyboardInterrupt):
        run(cells[:120])
    monkeypatch.setattr(
        mapper, "coordinates", lambda self, block, bar: done.append(block.first) or coordinates(self, block, bar)
    )
    run(cells[:120])
    assert done[0] > 0
    assert done[-1] == 112
    monkeypatch.setattr(mapper, "coordinates", stops)
    with pytest.raises(KeyboardInterrupt):
        run(cells[:120])
    monkeypatch.setattr(
        mapper, "coordinates", lambda self, block, bar: done.append(block.first) or coordinates(self, block, bar)
    )
    run(cells[:110])
    assert done[0] == 0
