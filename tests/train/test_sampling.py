"""Samplings: frequencies of classes, files and weights, seeks, ranks, workers, and refusals."""

import pickle

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from torch.utils.data import DataLoader

import scfm
from scfm.encoding import EncodingConfig, Vocabulary, make_encoding
from scfm.errors import LabelsError
from scfm.train import CellStream
from scfm.train.sampling import SAMPLINGS, Balanced, ByFile, Weighted, make_sampling

NAMES = [f"G{place}" for place in range(20)]
ROWS = [400, 200, 40]
N_CELLS = sum(ROWS)
CLASSES = np.array(["common"] * 500 + ["rare"] * 100 + ["rarest"] * 40)
WEIGHTS = np.tile([0.0, 1.0, 3.0, 4.0], N_CELLS // 4)
EPOCHS = 20

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")


@pytest.fixture(scope="module")
def encoding():
    return make_encoding(EncodingConfig(kind="bin"), vocabulary=Vocabulary.from_genes(NAMES))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three files of different sizes with classes and weights."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    order = rng.permutation(N_CELLS)
    obs = pd.DataFrame({"kind": pd.Categorical(CLASSES[order]), "weight": WEIGHTS[order], "text": CLASSES[order]})
    obs["negative"], obs["gap"], obs["no_class"] = -obs["weight"], obs["weight"].replace(3.0, np.nan), None
    obs.index = obs.index.astype(str)
    paths, start = [], 0
    for place, n_rows in enumerate(ROWS):
        counts = rng.poisson(1.0, size=(n_rows, 20)).astype(np.float32)
        counts[:, 0] = 1
        part = obs.iloc[start : start + n_rows].copy()
        part["no_class"] = pd.Categorical([None] * n_rows, categories=["a"])
        adata = anndata.AnnData(sp.csr_matrix(counts), obs=part, var=pd.DataFrame(index=NAMES))
        paths.append(folder / f"part{place}.{'zarr' if place == 1 else 'h5ad'}")
        adata.write_zarr(paths[-1]) if place == 1 else adata.write_h5ad(paths[-1])
        start += n_rows
    return paths, obs


def stream(files, encoding, **settings):
    return CellStream(files[0], encoding, **{"batch_cells": 32, "buffer_cells": 320, "block_cells": 20, **settings})


def draws_per_epoch(source, epochs=EPOCHS):
    """Mean number of draws of each cell in an epoch."""
    drawn = [cell for _ in range(epochs) for batch in source for cell in batch.cell_index_B.tolist()]
    return np.bincount(drawn, minlength=N_CELLS) / epochs


def assert_draws(found, expected):
    """Within five standard deviations: the draws beyond the whole part are Bernoulli."""
    rest = expected % 1
    deviation = np.sqrt(rest * (1 - rest) / EPOCHS)
    assert np.all(np.abs(found - expected) <= 5 * deviation + 1e-6)
    assert found.sum() == pytest.approx(expected.sum(), abs=5 * np.sqrt((rest * (1 - rest)).sum() / EPOCHS) + 1e-3)


def test_classes_are_drawn_equally_often(files, encoding):
    found = draws_per_epoch(stream(files, encoding, sampling="balanced:kind"))
    kinds = files[1]["kind"].to_numpy()
    assert_draws(found, N_CELLS / 3 / pd.Series(kinds).map(pd.Series(kinds).value_counts()).to_numpy(float))
    assert [found[kinds == kind].sum() for kind in np.unique(kinds)] == pytest.approx([N_CELLS / 3] * 3, rel=0.05)


def test_cells_are_drawn_by_their_weights_and_never_at_weight_zero(files, encoding):
    found = draws_per_epoch(stream(files, encoding, sampling="weighted:weight"))
    weight = files[1]["weight"].to_numpy()
    assert_draws(found, weight / weight.mean())
    assert found[weight == 0].sum() == 0


@pytest.mark.parametrize("given", [None, {"part0.h5ad": 1, "part1.zarr": 2, "part2.h5ad": 0.5}])
def test_files_are_drawn_equally_often_or_by_their_weights(files, encoding, given):
    found = draws_per_epoch(stream(files, encoding, sampling=ByFile(file_weights=given)))
    share = np.array([1, 1, 1] if given is None else list(given.values()), dtype=float)
    assert_draws(found, np.repeat(N_CELLS * share / share.sum() / ROWS, ROWS))


def test_a_rare_cell_is_drawn_at_most_so_often_and_the_log_says_so(files, encoding, caplog):
    found = draws_per_epoch(stream(files, encoding, sampling=Balanced(column="kind", max_repeats=2)))
    kinds = files[1]["kind"].to_numpy()
    assert set(found[kinds != "common"]) == {2.0}
    assert found[kinds == "common"].sum() == pytest.approx(N_CELLS - 2 * 140, rel=0.03)
    assert "140 of 640 cells would be drawn more than 2 times" in caplog.text


def test_cells_that_are_left_out_are_not_drawn(files, encoding):
    lengths_B = np.full(N_CELLS, 21)
    lengths_B[::2] = 0
    source = stream(files, encoding, sampling="balanced:kind", batch_cells=None, max_tokens=300, lengths_B=lengths_B)
    found = draws_per_epoch(source)
    assert found[::2].sum() == 0
    assert found.sum() == pytest.approx(N_CELLS / 2, rel=0.02)


def test_the_text_of_every_sampling_is_read_again_and_shuffled_is_the_default(files, encoding):
    for made in (Weighted(column="weight"), Balanced(column="kind"), ByFile(), make_sampling("shuffled")):
        assert make_sampling(made.to_text()) == made
    assert next(iter(SAMPLINGS)) == "shuffled"
    default, named = (list(stream(files, encoding, **each)) for each in ({}, {"sampling": "shuffled"}))
    assert [batch.cell_index_B.tolist() for batch in default] == [batch.cell_index_B.tolist() for batch in named]
    assert sorted(cell for batch in default for cell in batch.cell_index_B.tolist()) == list(range(N_CELLS))


@pytest.mark.parametrize("sampling", ["balanced:kind", "weighted:weight", "by-file"])
@pytest.mark.parametrize("step", [0, 5, 31])
def test_a_seek_continues_an_uninterrupted_run_on_every_rank(files, encoding, sampling, step):
    for rank in range(2):
        settings = {"sampling": sampling, "rank": rank, "world_size": 2}
        whole, resumed = stream(files, encoding, **settings), stream(files, encoding, **settings)
        expected = [batch for _ in range(3) for batch in whole]
        resumed.seek(step)
        seen: list = []
        while len(seen) < len(expected) - step:
            seen += resumed
        for one, other in zip(seen, expected[step:], strict=True):
            assert one.cell_index_B.tolist() == other.cell_index_B.tolist()


def test_ranks_draw_disjoint_cells_in_as_many_batches(files, encoding):
    ranks = [list(stream(files, encoding, sampling="weighted:weight", rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    first, second = ({cell for batch in batches for cell in batch.cell_index_B.tolist()} for batches in ranks)
    assert not first & second


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_pickles_draw_the_same_cells(files, encoding, workers):
    source = stream(files, encoding, sampling="balanced:kind")
    expected = sorted(cell for batch in pickle.loads(pickle.dumps(source)) for cell in batch.cell_index_B.tolist())
    loader = DataLoader(source, batch_size=None, num_workers=workers)
    assert sorted(cell for batch in loader for cell in batch.cell_index_B.tolist()) == expected


@pytest.mark.parametrize(
    ("sampling", "error", "match"),
    [
        ("balanced:knid", LabelsError, "'knid', which is not a column of `obs of part0.h5ad`. Did you mean 'kind'"),
        ("weighted:nothing", LabelsError, "not a column of `obs of part0.h5ad`"),
        ("weighted:text", LabelsError, "weights are numbers"),
        ("weighted:negative", LabelsError, "missing, negative or infinite"),
        ("weighted:gap", LabelsError, "missing, negative or infinite"),
        ("balanced:no_class", LabelsError, "no value for any cell"),
        ("balanced", ValueError, "needs a column of `obs`: 'balanced:COLUMN'"),
        ("by-file:kind", ValueError, "has no argument"),
        ("balance:kind", ValueError, "Did you mean 'balanced'"),
        (ByFile(file_weights={"part0.h5ad": 1}), LabelsError, "it lacks part1.zarr, part2.h5ad"),
        (ByFile(file_weights={"part0.h5ad": 0, "part1.zarr": 0, "part2.h5ad": 0}), LabelsError, "are 0 for all cells"),
    ],
)
def test_unfit_columns_and_names_are_refused(files, encoding, sampling, error, match):
    with pytest.raises(error, match=match):
        stream(files, encoding, sampling=sampling)


def test_weights_of_files_must_not_be_negative():
    with pytest.raises(LabelsError, match="must be finite and not negative"):
        ByFile(file_weights={"a.h5ad": -1})


def test_pretraining_records_the_sampling_and_refuses_to_resume_with_another(files, tmp_path):
    config = scfm.FitConfig(n_steps=2, tokens_per_step=256, accelerator="cpu")
    settings = {"config": config, "progress": False}
    scfm.pretrain(files[0], tmp_path / "run", sampling="balanced:kind", **settings)
    with pytest.raises(ValueError, match=r"sampling\.name: 'balanced', now 'shuffled'"):
        scfm.pretrain(files[0], tmp_path / "run", **settings)
