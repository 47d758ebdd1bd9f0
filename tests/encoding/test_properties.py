"""Properties that hold for any counts, and both backends alike."""

import dataclasses

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings

from scfm.data import CountSource
from scfm.data.batch import CellBatch
from scfm.encoding import EncodingConfig, GeneMap, RankEncoding, Vocabulary, make_encoding
from scfm.errors import CountsError, VocabularyMismatchError

N_GENES = 40
NAMES = [f"G{place}" for place in range(N_GENES)]
# The vocabulary knows the genes in another order than the data, not all of them, and more of its own.
VOCABULARY = Vocabulary.from_genes(
    [*NAMES[30:35], "OTHER1", *NAMES[:30][::-1], "OTHER2"],
    special=("pad", "mask", "cls", "eos", "target_depth", "source_depth"),
)
# Few different medians, so that scores tie across genes.
MEDIANS = np.array([1.0, 2.0, 0.5, 4.0, 1.0, 3.0])[np.arange(len(VOCABULARY)) % 6]
CONFIGS = [
    EncodingConfig(kind="rank"),
    EncodingConfig(kind="rank", context_length=7, add_cls=True, add_eos=True),
    EncodingConfig(kind="bin"),
    EncodingConfig(kind="bin", context_length=9, seed=5, n_bins=4),
    EncodingConfig(kind="bin", context_length=20, include_zeros=True),
    EncodingConfig(kind="bin", target_sum=1e4, log1p=True),
    EncodingConfig(kind="bucket"),
    EncodingConfig(kind="bucket", include_zeros=False, add_eos=False, context_length=6, depth_over="matrix"),
    EncodingConfig(kind="continuous"),
    EncodingConfig(kind="continuous", include_zeros=True, depth_over="matrix", context_length=30),
]
RANKS = [config for config in CONFIGS if config.kind == "rank"]

# Mostly zeros and ones as in real cells, with ties, and now and then counts beyond what is tallied.
COUNT = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 60), st.sampled_from([4095, 4096, 100_000]))
COUNTS = hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.just(N_GENES)), elements=COUNT)
TRAINING = st.one_of(st.none(), st.integers(0, 2**32))

pytestmark = pytest.mark.usefixtures("backend")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-{config.context_length}")


def build(config):
    return make_encoding(config, vocabulary=VOCABULARY, medians=MEDIANS if config.kind == "rank" else None)


def encode(config, counts, backend, names=NAMES, *, seed=None, depth_B=None):
    genes = GeneMap.from_names(names, VOCABULARY, duplicates="sum")
    rng = None if seed is None else np.random.default_rng(seed)
    return build(config).encode(counts, genes, rng=rng, backend=backend, depth_B=depth_B)


def assert_same(one, other):
    assert torch.equal(one.cu_seqlens, other.cu_seqlens)
    assert torch.equal(one.gene_ids_T, other.gene_ids_T)
    assert (one.values_T is None) == (other.values_T is None)
    assert one.values_T is None or torch.equal(one.values_T, other.values_T)
    assert torch.equal(one.depth_B, other.depth_B)


@every_config
@quick
@given(counts=COUNTS, seed=TRAINING)
def test_both_backends_give_the_same_bits(config, counts, seed, backend):
    if backend == "compiled":
        assert_same(encode(config, counts, "compiled", seed=seed), encode(config, counts, "numpy", seed=seed))
    else:
        # The same draw gives the same tokens; inference needs none.
        assert_same(encode(config, counts, "numpy", seed=seed), encode(config, counts, "numpy", seed=seed))


@every_config
@quick
@given(counts=COUNTS, order=st.permutations(range(N_GENES)))
def test_order_of_genes_does_not_matter(config, counts, order, backend):
    shuffled = encode(config, counts[:, order], backend, [NAMES[place] for place in order])
    assert_same(encode(config, counts, backend), shuffled)


@every_config
@quick
@given(counts=COUNTS, data=st.data())
def test_storage_does_not_matter(config, counts, data, backend):
    expected = encode(config, counts, backend)
    dtypes = [np.int32, np.int64, np.float32, np.float64, np.uint32, np.uint64]
    block = sp.csr_matrix(counts).astype(data.draw(st.sampled_from(dtypes)))
    index_dtype = data.draw(st.sampled_from([np.int32, np.int64]))
    block.indices, block.indptr = block.indices.astype(index_dtype), block.indptr.astype(index_dtype)
    assert_same(expected, encode(config, block, backend))
    assert_same(expected, encode(config, sp.csc_matrix(counts), backend))
    assert_same(expected, encode(config, sp.csr_array(counts), backend))


@every_config
@quick
@given(counts=COUNTS, seed=st.integers(0, 2**32))
def test_unsorted_repeated_and_zero_entries_do_not_matter(config, counts, seed, backend):
    rng = np.random.default_rng(seed)
    cells, genes = np.nonzero(counts)
    values = counts[cells, genes]
    # Split some counts over two entries of the same column, add explicit zeros, and shuffle within rows.
    part = rng.integers(0, values + 1)
    zeros = np.argwhere(counts == 0)[:5]
    cells, genes, values = (
        np.concatenate([cells, cells, zeros[:, 0]]),
        np.concatenate([genes, genes, zeros[:, 1]]),
        np.concatenate([part, values - part, np.zeros(len(zeros), dtype=int)]),
    )
    order = np.lexsort((rng.random(len(cells)), cells))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=len(counts)))])
    block = sp.csr_matrix((values[order].astype(np.float32), genes[order], indptr), shape=counts.shape)
    assert_same(encode(config, counts, backend), encode(config, block, backend))


@every_config
@quick
@given(counts=COUNTS, cut=st.integers(0, 6))
def test_chunks_do_not_matter(config, counts, cut, backend):
    parts = [encode(config, part, backend) for part in (counts[:cut], counts[cut:]) if len(part)]
    joined = CellBatch.concat(parts)
    assert_same(encode(config, counts, backend), joined.replace(cu_seqlens=joined.cu_seqlens.long()))


@every_config
@quick
@given(counts=COUNTS)
def test_columns_of_one_gene_are_summed(config, counts, backend):
    # Three genes twice: their counts split over two columns, far apart.
    half = counts[:, :3] // 2
    split = np.hstack([counts[:, :3] - half, counts[:, 3:], half])
    assert_same(encode(config, counts, backend), encode(config, split, backend, [*NAMES, *NAMES[:3]]))


@pytest.mark.parametrize("config", RANKS)
@quick
@given(counts=COUNTS, factor=st.integers(2, 1000))
def test_ranks_do_not_depend_on_depth(config, counts, factor, backend):
    one, other = encode(config, counts, backend), encode(config, counts * factor, backend)
    assert torch.equal(one.gene_ids_T, other.gene_ids_T)
    one = encode(config, counts, backend, depth_B=np.full(len(counts), 12345.0))
    assert torch.equal(one.gene_ids_T, other.gene_ids_T)


@every_config
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.float32])
def test_zeros_and_ones_of_any_dtype(config, dtype, backend):
    counts = np.random.default_rng(0).random((20, N_GENES)) < 0.3
    assert_same(
        encode(config, sp.csr_matrix(counts.astype(np.int64)), backend),
        encode(config, sp.csr_matrix(counts.astype(dtype)), backend),
    )


@every_config
def test_cells_of_one_gene_of_none_and_of_unknown_genes(config, backend):
    counts = np.zeros((3, N_GENES), dtype=np.int32)
    counts[0, 3] = 4
    counts[2, 38] = 9  # not in the vocabulary
    cells = encode(config, counts, backend)
    known = torch.from_numpy(np.isin(cells.gene_ids_T.numpy(), VOCABULARY.token_ids(["G3"])))
    assert known.sum() >= 1
    if not config.include_zeros:
        assert cells.lengths_B.tolist() == [
            config.n_special_tokens + 1,
            config.n_special_tokens,
            config.n_special_tokens,
        ]


def test_ties_of_ranks_go_by_vocabulary_order(backend):
    counts = np.zeros((1, N_GENES), dtype=np.int32)
    counts[0, [4, 9, 17]] = 2
    flat = RankEncoding(EncodingConfig(kind="rank"), VOCABULARY, medians=np.ones(len(VOCABULARY)))
    cells = flat.encode(counts, GeneMap.from_names(NAMES, VOCABULARY), backend=backend)
    assert cells.gene_ids_T.tolist() == sorted(VOCABULARY.token_ids(["G4", "G9", "G17"]).tolist())


def test_genes_without_a_median_are_left_out(backend):
    medians = MEDIANS.copy()
    medians[VOCABULARY.token_ids(["G5"])] = np.nan
    encoding = RankEncoding(EncodingConfig(kind="rank"), VOCABULARY, medians=medians)
    cells = encoding.encode(np.ones((1, N_GENES)), GeneMap.from_names(NAMES, VOCABULARY), backend=backend)
    expected = set(VOCABULARY.token_ids(NAMES).tolist()) - {-1, *VOCABULARY.token_ids(["G5"]).tolist()}
    assert set(cells.gene_ids_T.tolist()) == expected


@pytest.mark.parametrize("n_genes", [30, 700, 5000])
def test_thousands_of_tied_and_untied_genes(n_genes, backend, oracle, tokens_of):
    """Long enough for radix sorts, long runs of ties, and truncation."""
    rng = np.random.default_rng(n_genes)
    names = [f"H{place}" for place in range(n_genes)]
    vocabulary = Vocabulary.from_genes(rng.permutation(names))
    medians = np.where(rng.random(len(vocabulary)) < 0.5, 1.0, rng.lognormal(size=len(vocabulary)))
    counts = rng.negative_binomial(0.5, 0.1, size=(4, n_genes))
    counts[3] = 1
    genes = GeneMap.from_names(names, vocabulary)
    encoding = RankEncoding(EncodingConfig(kind="rank", context_length=512), vocabulary, medians=medians)
    ranks = encoding.encode(counts, genes, backend=backend)
    bins = make_encoding("bin", vocabulary=vocabulary).encode(counts, genes, backend=backend)
    for cell, row in enumerate(counts):
        known = oracle.cell(row, names, vocabulary)
        assert tokens_of(ranks, cell) == oracle.rank(known, medians, 512)
        assert tokens_of(bins, cell) == oracle.bin(known, n_bins=51, seed=0, context=1200, cls=vocabulary.cls_id)


def test_equal_counts_spread_over_all_bins_of_their_tie(backend):
    cells = encode(EncodingConfig(kind="bin"), np.ones((1, N_GENES), dtype=int), backend)
    bins = cells.values_T[1:]
    assert bins.min() >= 1
    assert bins.max() <= 50
    assert len(bins.unique()) > 15  # 35 genes over 50 bins: a fixed choice would give one


def test_training_draws_differ_and_repeat_by_seed(backend):
    counts = np.ones((3, N_GENES), dtype=int)
    config = EncodingConfig(kind="bin", context_length=10)
    first, again, other = (encode(config, counts, backend, seed=seed) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first.gene_ids_T, other.gene_ids_T)
    rows = first.gene_ids_T.reshape(3, 10)
    assert not torch.equal(rows[0], rows[1])


def test_wrapped_row_pointers_are_refused():
    """What int32 pointers look like past 2^31 non-zero entries."""
    block = sp.csr_matrix(np.eye(3, dtype=np.float32))
    block.indptr = np.array([0, 2**31 - 1, -(2**31), 3], dtype=np.int32)
    with pytest.raises(CountsError, match=r"2\^31"):
        CountSource(block)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("indices", [0, 1, 10**6], "column index 1000000, but only 40 columns"),
        ("indices", [0, 1, -5], "column index -5"),
        ("indptr", [0, 9, 2, 3], "row pointers"),
        ("indptr", [0, 1, 2, 9], "row pointers"),
        ("indptr", [0, 1, 3], "4 rows|3 row pointers"),
    ],
)
def test_nothing_is_read_outside_the_matrix(backend, name, values, message):
    block = sp.csr_matrix(np.eye(3, N_GENES, dtype=np.float32))
    setattr(block, name, np.array(values, dtype=np.int32))
    with pytest.raises(CountsError, match=message):
        encode(EncodingConfig(kind="rank"), block, backend)


def test_a_map_of_another_vocabulary_is_refused(backend):
    """Its tokens would be other genes, or lie outside the tables of compiled code."""
    encoding = make_encoding("bin", vocabulary=VOCABULARY)
    for other in (VOCABULARY.genes[::-1], VOCABULARY.genes[:5], [*VOCABULARY.genes, *(f"X{i}" for i in range(99))]):
        genes = GeneMap.from_names(NAMES, Vocabulary.from_genes(other), min_coverage=0)
        with pytest.raises(VocabularyMismatchError, match="was made for Vocabulary"):
            encoding.encode(np.ones((1, N_GENES)), genes, backend=backend)
    equal = Vocabulary.from_dict(VOCABULARY.to_dict())
    encoding.encode(np.ones((1, N_GENES)), GeneMap.from_names(NAMES, equal), backend=backend)


@pytest.mark.parametrize("token", [-2, len(VOCABULARY)])
def test_a_map_never_points_outside_its_vocabulary(token):
    genes = GeneMap.from_names(NAMES, VOCABULARY)
    with pytest.raises(ValueError, match="must be -1 or a token"):
        dataclasses.replace(genes, token_ids=np.full(N_GENES, token, dtype=np.int32))


@pytest.mark.parametrize("depth", [np.ones(2), 3.0, np.ones((3, 1))])
def test_depths_of_other_cells_are_refused(backend, depth):
    genes = GeneMap.from_names(NAMES, VOCABULARY)
    with pytest.raises(ValueError, match="`depth_B` has shape"):
        make_encoding("bucket", vocabulary=VOCABULARY).encode(
            np.ones((3, N_GENES)), genes, depth_B=depth, backend=backend
        )
