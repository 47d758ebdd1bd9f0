"""Every encoding against its oracle, on every data set in SCFM_DATA."""

import anndata
import numpy as np
import pytest

import scfm.pp
from scfm.data import CountSource
from scfm.encoding import EncodingConfig, RankEncoding, Vocabulary, make_encoding
from scfm.errors import VocabularyMismatchError

HUMAN = [
    "pbmc3k_raw_counts_labels.h5ad",
    "kang_ifnb_2000.h5ad",
    "ifnb1k_832.h5ad",
    "papalexi_thp1_20729x299.h5ad",
]
EVERY = [*HUMAN, "mouse_endocrinogenesis_spliced_3696x2000.h5ad"]
N_CELLS = 12


def read(scfm_data, file):
    """A dozen cells spread over the data set, the shortest among them."""
    adata = anndata.read_h5ad(scfm_data / file)
    genes = np.diff(adata.X.indptr)
    return adata[np.unique([*np.linspace(0, adata.n_obs - 1, N_CELLS - 1).astype(int), genes.argmin()])].copy()


def dense_rows(adata):
    return adata.X.toarray()


@pytest.mark.parametrize("file", HUMAN)
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_rank_is_geneformers(scfm_data, file, version, human_ensembl, oracle, tokens_of, backend):
    vocabulary, medians = human_ensembl
    settings = {
        "V1": {"context_length": 2048},
        "V2": {"context_length": 4096, "add_cls": True, "add_eos": True},
    }[version]
    adata = read(scfm_data, file)
    encoding = RankEncoding(EncodingConfig(kind="rank", duplicates="sum", **settings), vocabulary, medians=medians)
    cells = scfm.pp.encode(adata, encoding, backend=backend)
    ids = [vocabulary.tokens[i] if i >= 0 else "" for i in vocabulary.token_ids(adata.var_names)]
    ends = {"cls": vocabulary.cls_id, "eos": vocabulary.eos_id} if version == "V2" else {}
    for cell, row in enumerate(dense_rows(adata)):
        expected = oracle.rank(oracle.cell(row, ids, vocabulary), medians, settings["context_length"], **ends)
        assert tokens_of(cells, cell) == expected


@pytest.mark.parametrize("file", HUMAN)
def test_rank_order_never_contradicts_the_published_score(scfm_data, file, human_ensembl):
    """count / n_counts x 10,000 / median, with n_counts over ALL genes: parity up to permutation of ties."""
    vocabulary, medians = human_ensembl
    adata = read(scfm_data, file)
    encoding = RankEncoding(EncodingConfig(kind="rank", duplicates="sum"), vocabulary, medians=medians)
    cells = scfm.pp.encode(adata, encoding)
    tokens = vocabulary.token_ids(adata.var_names)
    for cell, row in enumerate(dense_rows(adata)):
        counts = np.zeros(len(vocabulary))
        np.add.at(counts, tokens[tokens >= 0], row[tokens >= 0])
        score = counts / row.sum() * 10_000 / medians
        order = cells.gene_ids_T[cells.cu_seqlens[cell] : cells.cu_seqlens[cell + 1]].numpy()
        along = score[order]
        assert (np.diff(along) <= 1e-12 * along[:-1]).all()
        left_out = np.setdiff1d(np.flatnonzero(score > 0), order)
        assert len(order) == min(2048, np.count_nonzero(score > 0))
        assert not len(left_out) or score[left_out].max() <= along[-1] * (1 + 1e-12)


@pytest.mark.parametrize("file", HUMAN)
@pytest.mark.parametrize("settings", [{}, {"context_length": 200, "seed": 7}, {"n_bins": 5}])
def test_bin_is_scgpts(scfm_data, file, settings, human_symbols, oracle, tokens_of, backend):
    adata = read(scfm_data, file)
    encoding = make_encoding(EncodingConfig(kind="bin", **settings), vocabulary=human_symbols)
    cells = scfm.pp.encode(adata, encoding, backend=backend)
    config = encoding.config
    for cell, row in enumerate(dense_rows(adata)):
        expected = oracle.bin(
            oracle.cell(row, adata.var_names, human_symbols),
            n_bins=config.n_bins,
            seed=config.seed,
            context=config.context_length,
            cls=human_symbols.cls_id,
        )
        assert tokens_of(cells, cell) == expected


@pytest.mark.parametrize("file", EVERY)
def test_normalized_and_logged_bins_keep_zeros(scfm_data, file, oracle, tokens_of):
    adata = read(scfm_data, file)[:, :300].copy()
    adata.obs["depth"] = read(scfm_data, file).X.sum(axis=1).A1
    config = EncodingConfig(kind="bin", target_sum=1e4, log1p=True, include_zeros=True, context_length=250, cls_value=0)
    vocabulary = Vocabulary.from_genes(adata.var_names)
    cells = scfm.pp.encode(adata, make_encoding(config, vocabulary=vocabulary), depth_key="depth", empty="keep")
    for cell, row in enumerate(dense_rows(adata)):
        expected = oracle.bin(
            oracle.cell(row, adata.var_names, vocabulary),
            n_bins=51, seed=0, context=250, cls=vocabulary.cls_id, cls_value=0.0, zeros=vocabulary.gene_ids.tolist(),
            log1p=True, target_sum=1e4, depth=adata.obs["depth"].iloc[cell],
        )  # fmt: skip
        assert tokens_of(cells, cell) == expected


@pytest.mark.parametrize("file", EVERY)
def test_bucket_is_scberts(scfm_data, file, oracle, tokens_of, backend):
    adata = read(scfm_data, file)
    # A panel that the data cover in part, in another order, as scBERT's 16,906 genes are.
    panel = [*adata.var_names[::-3], "a gene that is not in the data"]
    vocabulary = Vocabulary([*panel, "<end>", "<pad>"], special={"eos": "<end>", "pad": "<pad>"})
    encoding = make_encoding(EncodingConfig(kind="bucket"), vocabulary=vocabulary)
    cells = scfm.pp.encode(adata, encoding, backend=backend, empty="keep")
    for cell, row in enumerate(dense_rows(adata)):
        counts = oracle.cell(row, adata.var_names, vocabulary)
        expected = oracle.bucket(counts, genes=range(len(panel)), eos=len(panel))
        assert tokens_of(cells, cell) == expected


@pytest.mark.parametrize("file", HUMAN)
def test_continuous_is_scfoundations(scfm_data, file, oracle, tokens_of):
    from scfm.encoding import read_vocabulary

    path = scfm_data / "vocab" / "scfoundation_OS_scRNA_gene_index.19264.tsv"
    vocabulary = read_vocabulary(path, add_special=("target_depth", "source_depth", "pad"))
    assert vocabulary.special_id("target_depth") == 19264
    assert vocabulary.special_id("source_depth") == 19265
    adata = read(scfm_data, file)
    encoding = make_encoding("continuous", vocabulary=vocabulary)
    deeper = encoding.replace(target_depth=10_000)
    for asked, some in ((None, encoding), (10_000, deeper)):
        cells = scfm.pp.encode(adata, some, empty="keep")
        for cell, row in enumerate(dense_rows(adata)):
            counts = oracle.cell(row, adata.var_names, vocabulary)
            expected = oracle.continuous(counts, target=19264, source=19265, target_depth=asked)
            found = tokens_of(cells, cell)
            assert [token for token, _ in found] == [token for token, _ in expected]
            np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], rtol=1e-6)


def test_a_mouse_is_refused_by_a_human_vocabulary(scfm_data, human_ensembl, human_symbols):
    adata = anndata.read_h5ad(scfm_data / "mouse_endocrinogenesis_spliced_3696x2000.h5ad")
    for vocabulary in (human_ensembl[0], human_symbols):
        with pytest.raises(VocabularyMismatchError, match=r"look like mouse, but the vocabulary is human"):
            scfm.pp.encode(adata, make_encoding("bin", vocabulary=vocabulary))


def test_a_mouse_is_welcome_in_its_own_vocabulary(scfm_data, oracle, tokens_of, backend):
    adata = read(scfm_data, "mouse_endocrinogenesis_spliced_3696x2000.h5ad")
    encoding = make_encoding("rank", adata=adata)
    cells = scfm.pp.encode(adata, encoding, backend=backend)
    vocabulary = encoding.vocabulary
    for cell, row in enumerate(dense_rows(adata)):
        counts = oracle.cell(row, adata.var_names, vocabulary)
        assert tokens_of(cells, cell) == oracle.rank(counts, encoding.medians, 2048)


def test_a_human_name_list_of_scgpt_covers_pbmc(scfm_data, human_symbols):
    from scfm.encoding import GeneMap

    adata = anndata.read_h5ad(scfm_data / HUMAN[0], backed="r")
    report = GeneMap.of(CountSource.of(adata), human_symbols).report
    assert (report.n_vars, report.species, report.vocabulary_species) == (32738, "human", "human")
    assert report.n_matched == sum(name in human_symbols for name in adata.var_names)
