"""`annotate_files` gives the labels of `annotate`, in every form, also when it is stopped and started again."""

import anndata
import numpy as np
import pandas as pd
import pytest

import scfm
from scfm.errors import LabelsError, ModelTaskError
from scfm.tl import _file_pass


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:120].copy()


@pytest.fixture(scope="module")
def model(adata):
    quick = {"context_length": 32, "baselines": False, "pretrain": False, "progress": False}
    return scfm.fit(adata.copy(), labels_key="bulk_labels", config=scfm.FitConfig(n_steps=1), **quick)


@pytest.fixture
def files(adata, tmp_path):
    adata[:70].copy().write_h5ad(tmp_path / "one.h5ad")
    adata[70:].copy().write_zarr(tmp_path / "two.zarr")
    return [tmp_path / "one.h5ad", tmp_path / "two.zarr"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(_file_pass, "BLOCK_CELLS", 16)


pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:anndata"),
    pytest.mark.filterwarnings("ignore::UserWarning:zarr"),
]


def read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".csv":
        return pd.read_csv(path, index_col=0)
    written = anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)
    return pd.concat([written.obs, pd.DataFrame(written.obsm["scfm_proba"], index=written.obs_names)], axis=1)


@pytest.mark.parametrize(
    "options", [{}, {"max_novelty": 0.5, "min_confidence": 0.3}, {"majority_key": "bulk_labels"}, {"adapt": True}]
)
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".csv"])
def test_every_form_holds_the_labels_of_annotate(adata, model, files, tmp_path, suffix, options):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    expected = scfm.tl.annotate(adata, model, copy=True, progress=False, **options)
    for inputs, cells in ((files, expected), (files[:1], expected[:70]), (files[1:], expected[70:])):
        if len(inputs) == 1 and {"majority_key", "adapt"} & set(options):
            continue  # what depends on the other cells
        out = tmp_path / f"out{len(inputs)}{suffix}"
        counted = scfm.tl.annotate_files(inputs, out, model, progress=False, **options)
        found = read(out)
        assert found["scfm_label"].astype(str).tolist() == cells.obs["scfm_label"].astype(str).tolist()
        assert counted[counted > 0].to_dict() == found["scfm_label"].value_counts().loc[lambda n: n > 0].to_dict()
        assert found.index.astype(str).tolist() == cells.obs_names.tolist()
        for name in ("scfm_confidence", "scfm_novelty"):
            np.testing.assert_allclose(found[name], cells.obs[name], rtol=1e-6 if suffix == ".csv" else 0)
        proba = found.iloc[:, -len(model.labels) :].to_numpy(np.float32)
        np.testing.assert_allclose(proba, cells.obsm["scfm_proba"], rtol=1e-6 if suffix == ".csv" else 0)
        if len(inputs) == 2:
            assert found["file"].value_counts().to_dict() == {"one.h5ad": 70, "two.zarr": 50}


def test_a_copy_keeps_what_the_input_holds(model, files, tmp_path):
    scfm.tl.annotate_files(files[:1], tmp_path / "out.h5ad", model, progress=False)
    source, written = anndata.read_h5ad(files[0]), anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (source.X != written.X).nnz == 0
    pd.testing.assert_frame_equal(source.obs, written.obs[source.obs.columns])
    assert list(written.obs.columns[: source.obs.shape[1]]) == list(source.obs.columns)
    assert written.uns["scfm"]["scfm_label"]["model_id"] == model.id


def test_a_stopped_run_resumes(adata, model, files, tmp_path, monkeypatch):
    predict, blocks = model.predict_proba, []

    def counted(cells, *args, **settings):
        if len(blocks) == 3:
            raise KeyboardInterrupt
        blocks.append(cells.n_cells)
        return predict(cells, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(model, "predict_proba", counted)
        with pytest.raises(KeyboardInterrupt):
            scfm.tl.annotate_files(files, tmp_path / "out.h5ad", model, progress=False)
    done, again = sum(blocks), []
    monkeypatch.setattr(
        model, "predict_proba", lambda cells, *a, **k: again.append(len(cells)) or predict(cells, *a, **k)
    )
    scfm.tl.annotate_files(files, tmp_path / "out.h5ad", model, progress=False)
    assert done + sum(again) == 120
    expected = scfm.tl.annotate(adata, model, copy=True).obsm["scfm_proba"]
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["scfm_proba"], expected)


def test_what_cannot_be_done_is_refused_before_any_work(adata, model, files, tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.npy'"):
        scfm.tl.annotate_files(files, tmp_path / "out.npy", model)
    with pytest.raises(LabelsError, match="majority_key"):
        scfm.tl.annotate_files(files, tmp_path / "out.h5ad", model, majority_key="none")
    plain = scfm.fit(adata[:40].copy(), config=scfm.FitConfig(n_steps=1), progress=False)
    with pytest.raises(ModelTaskError):
        scfm.tl.annotate_files(files, tmp_path / "out.h5ad", plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5ad", "two.zarr"]
