"""`scfm.pp.check` says ready exactly when `scfm.pp.encode` succeeds.

Data without cells aside: `encode` gives an empty batch, and they are not ready, because every tool refuses them.
"""

import anndata
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings

import scfm
from scfm.encoding import make_encoding
from scfm.errors import ScfmError

GENES = [f"ENSG{1000 + index:011d}" for index in range(12)]
VOCABULARY = scfm.Vocabulary.from_genes(GENES, special=("pad", "mask", "cls", "eos"))
ENCODINGS = {
    "rank": make_encoding("rank", vocabulary=VOCABULARY, medians=np.ones(len(VOCABULARY))),
    "bin": make_encoding("bin", vocabulary=VOCABULARY),
}

COUNTS = st.one_of(
    st.integers(0, 5), st.integers(0, 5), st.sampled_from([-1, 0.5, np.nan, np.inf, 1e300, 2**24, 2**40])
)
NAMES = st.one_of(st.sampled_from(GENES), st.sampled_from([*GENES, "ENSG0", "CD3E", "ENSMUSG00000000001", "nan", ""]))
FORMS = {
    "dense": np.asarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_array,
    "float32": lambda counts: np.asarray(counts, dtype=np.float32),
    "explicit zeros": lambda counts: sp.csr_matrix(
        (
            counts.ravel(),
            np.tile(np.arange(counts.shape[1]), len(counts)),
            np.arange(len(counts) + 1) * counts.shape[1],
        ),
        shape=counts.shape,
    ),
}


@st.composite
def data(draw):
    n_genes = draw(st.integers(1, 8))
    shape = (draw(st.integers(1, 5)), n_genes)
    counts = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 1.0, 2.0, 3.0])))
    for _ in range(draw(st.integers(0, 2))):
        counts[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, n_genes - 1))] = draw(COUNTS)
    names = draw(st.permutations(GENES))[:n_genes]
    for _ in range(draw(st.integers(0, 2))):
        names[draw(st.integers(0, n_genes - 1))] = draw(NAMES)
    with np.errstate(over="ignore"):
        matrix = FORMS[draw(st.sampled_from(sorted(FORMS)))](counts)
    adata = anndata.AnnData(matrix, var=pd.DataFrame(index=[f"row{index}" for index in range(n_genes)]))
    adata.var["id"] = pd.array(names, dtype="string")
    if draw(st.booleans()):
        adata.obs["depth"] = draw(st.lists(COUNTS, min_size=shape[0], max_size=shape[0]))
        return adata, {"gene_key": "id", "depth_key": "depth"}
    return adata, {"gene_key": "id"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data(), st.sampled_from(sorted(ENCODINGS)))
def test_ready_means_that_encode_succeeds(case, kind):
    adata, arguments = case
    report = scfm.pp.check(adata, ENCODINGS[kind], **arguments)
    refusal = None
    try:
        scfm.pp.encode(adata, ENCODINGS[kind], **arguments)
    except ScfmError as error:
        refusal = str(error)
    assert report.ok == (refusal is None), f"encode says {refusal}, check says\n{report}"
