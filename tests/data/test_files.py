import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scfm.data import CountSource
from scfm.errors import CountsError

NAMES = [f"G{place}" for place in range(50)]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")


def test_files_open_by_layer_raw_and_depth(tmp_path):
    counts = sp.csr_matrix(np.eye(4, 50, dtype=np.float32))
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=NAMES), layers={"more": counts * 2, "csc": counts.tocsc()})
    adata.raw = anndata.AnnData(counts * 3, var=adata.var)
    adata.obs["depth"] = 7.0
    adata.layers["dense"] = counts.toarray()
    adata.write_h5ad(tmp_path / "a.h5ad")
    for layer, sums in ((None, 1), ("more", 2), ("raw", 3), ("csc", 1), ("dense", 1)):
        assert CountSource.of(tmp_path / "a.h5ad", layer=layer).depth().tolist() == [sums] * 4
    assert CountSource.of(tmp_path / "a.h5ad", depth_key="depth").depth().tolist() == [7] * 4
    adata.uns["scfm"] = {"depth_key": "depth"}
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert CountSource.of(tmp_path / "b.h5ad").depth().tolist() == [7] * 4
    with pytest.raises(CountsError, match=r"`layer` is .none., which does not exist"):
        CountSource.of(tmp_path / "a.h5ad", layer="none")
    with pytest.raises(CountsError, match="'none', which is not a column"):
        CountSource.of(tmp_path / "a.h5ad", depth_key="none")
    with pytest.raises(FileNotFoundError):
        CountSource.of(tmp_path / "none.h5ad")
