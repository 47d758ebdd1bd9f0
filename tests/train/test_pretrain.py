"""Pretraining from files: streams, starts from a decomposition or a model, resumes, refuses to mix runs, and is the same from two processes as from one."""

import copy
import functools
import json
import os
import signal
from dataclasses import replace

import anndata
import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import linalg, sparse

import scfm
from scfm import families
from scfm._files import output_lock
from scfm.encoding import EncodingConfig, medians
from scfm.errors import CountsError, EmptyCellError, ModelFileError, OutputError, VocabularyMismatchError
from scfm.train import FitConfig, loop, start, survey, train
from scfm.train.pretraining import pretrain
from scfm.train.statistics import Data, Learning, Statistics

CONFIG = FitConfig(n_steps=6, tokens_per_step=600, checkpoint_every=2, accelerator="cpu")


def write_file(path, genes, seed, **var):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.3, 3.0, len(genes)), (60, len(genes))).astype(np.float32)
    counts[:, 0] = 1  # no empty cell
    adata = anndata.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(var, index=genes))
    adata.write_h5ad(path)
    return adata


@pytest.fixture
def files(tmp_path):
    genes = [f"GENE{number}" for number in range(60)]
    write_file(tmp_path / "a.h5ad", genes[:50], seed=0)
    write_file(tmp_path / "b.h5ad", genes[10:], seed=1)
    return [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]


def run(files, out, config=CONFIG, **settings):
    return pretrain(files, out, config=config, progress=False, **settings)


def statistics_for(files, config=None, *, held_out_B=None, **settings):
    held_out_B = np.zeros(60 * len(files), dtype=bool) if held_out_B is None else held_out_B
    return learning_of(files, config, held_out_B=held_out_B, **settings).statistics()


def learning_of(files, config=None, **settings):
    return Learning(data=Data(paths=tuple(files)), config=config or EncodingConfig(kind="rank"), **settings)


def joined(files):
    adatas = [anndata.read_h5ad(path) for path in files]
    return anndata.concat(adatas, join="outer", fill_value=0, keys=["a", "b"], index_unique="-")


def test_it_leaves_a_model_and_a_record(files, tmp_path):
    model = scfm.pretrain(files, tmp_path / "run", config=CONFIG, progress=False)
    out = tmp_path / "run"
    assert {"model", "config.json", "losses.csv", "losses.png", "README.md", "checkpoints"} <= {
        path.name for path in out.iterdir()
    }
    assert len(pd.read_csv(out / "losses.csv")) == 6
    assert json.loads((out / "config.json").read_text())["pretrain"]["config"] == CONFIG.to_dict() | {
        "learning_rate": 3e-4,
        "embedding_learning_rate_scale": 0.1,
        "trainable": "all",
        "seed": 0,
    }
    assert model.id in (out / "README.md").read_text()
    assert scfm.load(out / "model").id == model.id


def test_statistics_are_those_of_all_cells_of_all_files(files):
    """Oracles: the encoding of the joined data, its tokens, and scikit-learn's exact decomposition."""
    found = statistics_for(files, n_components=5)
    adata = joined(files)
    expected = scfm.encoding.make_encoding("rank", adata=adata)
    assert set(found.vocabulary.genes) == set(expected.vocabulary.genes)
    for gene in found.vocabulary.genes:
        got, wanted = (each.medians[each.vocabulary.token_ids([gene])[0]] for each in (found, expected))
        assert got == pytest.approx(wanted, rel=1e-6), gene
    cells = scfm.pp.encode(adata, found.encoding(EncodingConfig(kind="rank")))
    assert found.lengths_B.tolist() == cells.lengths_B.tolist()
    assert found.totals_V.sum() == adata.X.sum()
    assert found.fraction_known == 1
    expression_BV = scfm.pp.log_expression(adata, found.encoding(EncodingConfig(kind="rank"))).toarray()
    right = linalg.svd(expression_BV, full_matrices=False)[2][:5]
    assert linalg.svdvals(found.loadings_VR.T @ right.T)[:3].min() > 0.99


@pytest.mark.parametrize(
    "config",
    [
        EncodingConfig(kind="rank", context_length=10, add_cls=True, add_eos=True),
        EncodingConfig(kind="bin"),
        EncodingConfig(kind="bin", include_zeros=True),
        EncodingConfig(kind="bucket"),
        EncodingConfig(kind="continuous", include_zeros=True),
    ],
    ids=lambda config: f"{config.kind}-{config.context_length}-{config.include_zeros}",
)
def test_lengths_are_bounds_for_every_encoding(files, config):
    """The bounds are exact, except that a file need not have all genes that the vocabulary has."""
    found = statistics_for(files, config)
    cells = scfm.pp.encode(joined(files), found.encoding(config))
    assert found.lengths_B.tolist() == cells.lengths_B.tolist()


def test_cells_that_are_held_out_teach_nothing(files):
    held_out_B = np.zeros(120, dtype=bool)
    held_out_B[60:] = True  # all of the second file, whose last ten genes the first one lacks
    found = statistics_for(files, held_out_B=held_out_B, n_components=3)
    first = statistics_for(files[:1], n_components=3)
    assert found.vocabulary.genes == first.vocabulary.genes
    np.testing.assert_array_equal(found.medians, first.medians)
    np.testing.assert_allclose(found.loadings_VR, first.loadings_VR, atol=1e-6)
    assert found.lengths_B.tolist() == [*first.lengths_B.tolist(), *[0] * 60]


def test_loadings_come_from_cells_that_are_spread_evenly_over_the_files(files, monkeypatch):
    """Oracle: the exact decomposition of every twelfth cell. Medians are those of all cells."""
    monkeypatch.setattr(survey, "MAX_SAMPLED_CELLS", 10)
    found, every = statistics_for(files, n_components=2), joined(files)
    encoding = scfm.encoding.make_encoding("rank", adata=every, vocabulary=found.vocabulary)
    np.testing.assert_allclose(found.medians, encoding.medians, rtol=1e-6)
    sample_BV = scfm.pp.log_expression(every[np.arange(11, 120, 12)], encoding).toarray()
    right = linalg.svd(sample_BV, full_matrices=False)[2][:2]
    assert linalg.svdvals(found.loadings_VR.T @ right.T).min() > 0.99
    assert found.lengths_B.all()


def test_statistics_are_made_once_and_read_again(files, tmp_path, monkeypatch):
    model = run(files, tmp_path / "run")
    stored = Statistics.load(tmp_path / "run" / "statistics", "another key")
    assert stored is None
    monkeypatch.setattr(Learning, "survey", None)  # to learn again would fail
    assert run(files, tmp_path / "run").id == model.id


@pytest.mark.parametrize("max_exact", [10**9, 400, 2500])
def test_statistics_of_two_processes_are_those_of_one(files, tmp_path, monkeypatch, max_exact):
    """Each process reads some files; medians are exact in all parts, in some, or in none."""
    monkeypatch.setattr(medians, "MAX_EXACT_VALUES", max_exact)
    write_file(tmp_path / "c.h5ad", [f"GENE{number}" for number in range(5, 30)], seed=2)
    files = [*files, tmp_path / "c.h5ad"]
    held_out_B = np.arange(180) % 7 == 0
    learning = learning_of(files, held_out_B=held_out_B, n_components=3)
    one, shared = learning.statistics(), learning.finish([learning.survey(rank, 2) for rank in range(2)])
    assert one.vocabulary == shared.vocabulary
    for name in ("medians", "lengths_B", "totals_V", "loadings_VR"):
        np.testing.assert_array_equal(getattr(one, name), getattr(shared, name))
    assert one.fraction_known == shared.fraction_known


def test_counts_are_not_read_if_only_lengths_are_missing(files, tmp_path, monkeypatch):
    """Row pointers bound the lengths. Cells without a gene of the vocabulary are found while training, and left out."""
    full = statistics_for(files)
    vocabulary = scfm.Vocabulary.from_genes(full.vocabulary.genes[5:30], special=["pad", "mask"])
    given = {"vocabulary": vocabulary, "medians": np.ones(len(vocabulary))}
    exact = learning_of(files, held_out_B=np.zeros(120, bool), **given, n_components=1).statistics()
    monkeypatch.setattr(survey.Survey, "add", None)  # the pass over the counts would fail
    bounds = learning_of(files, held_out_B=np.arange(120) == 3, **given).statistics()
    assert np.array_equal(bounds.medians, given["medians"])
    assert bounds.lengths_B[3] == 0
    others = np.arange(120) != 3
    assert (bounds.lengths_B >= exact.lengths_B)[others].all()
    assert (bounds.lengths_B == [np.count_nonzero(row) for row in joined(files).X.toarray()])[others].all()
    model = run(files, tmp_path / "run", init=None, **given)
    assert model.encoding.vocabulary == vocabulary
    assert len(run(files, tmp_path / "further", init=model).history["stages"]) == 2


def test_a_file_without_row_pointers_is_read_for_its_lengths(files, tmp_path):
    adata = anndata.read_h5ad(files[0])
    adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "dense.h5ad")
    genes = statistics_for(files[:1]).vocabulary
    given = {"vocabulary": genes, "medians": np.ones(len(genes)), "held_out_B": np.zeros(60, bool)}
    dense, sparse_ = (learning_of([path], **given).statistics() for path in (tmp_path / "dense.h5ad", files[0]))
    assert dense.lengths_B.tolist() == sparse_.lengths_B.tolist()
    assert dense.totals_V.sum() == adata.X.sum()


def test_cells_without_a_gene_of_the_vocabulary_are_left_out_while_training(tmp_path):
    genes = [f"GENE{number}" for number in range(40)]
    adata = write_file(tmp_path / "a.h5ad", genes, seed=0)
    counts = adata.X.toarray()
    counts[::3, :20] = 0  # these cells express no gene of the vocabulary, but others
    counts[::3, 30] = 1
    adata.X = sparse.csr_matrix(counts)
    adata.write_h5ad(tmp_path / "a.h5ad")
    encoding = scfm.encoding.make_encoding(
        "bin", vocabulary=scfm.Vocabulary.from_genes(genes[:20], special=["pad", "mask", "cls"])
    )
    lengths_B = np.diff(adata.X.indptr) + 1
    stream = scfm.train.CellStream(tmp_path / "a.h5ad", encoding, max_tokens=60, lengths_B=lengths_B)
    batches = list(stream)
    assert len(batches) > 5
    assert min(len(batch) for batch in batches) > 0
    assert set(np.concatenate([batch.cell_index_B for batch in batches])) == set(range(60)) - set(range(0, 60, 3))
    nothing = scfm.train.CellStream(
        tmp_path / "a.h5ad", encoding, max_tokens=60, lengths_B=lengths_B * (np.arange(60) % 3 == 0)
    )
    with pytest.raises(EmptyCellError, match="20 cells that were read together"):
        list(nothing)


def test_files_with_symbols_and_files_with_ensembl_ids_train_one_vocabulary(tmp_path):
    symbols, ensembl = [f"GENE{n}" for n in range(40)], [f"ENSG{n:011d}" for n in range(40)]
    write_file(tmp_path / "a.h5ad", symbols, seed=0, gene_ids=ensembl)
    write_file(tmp_path / "b.h5ad", symbols[::-1], seed=1)
    other = write_file(tmp_path / "c.h5ad", [f"{name}.3" for name in ensembl], seed=2)
    paths = [tmp_path / name for name in ("a.h5ad", "b.h5ad", "c.h5ad")]
    model = run(paths, tmp_path / "run", CONFIG.replace(n_steps=1))
    assert set(model.encoding.vocabulary.genes) <= set(symbols)
    renamed = other.copy()
    renamed.var_names = symbols
    assert torch.equal(scfm.pp.encode(other, model).gene_ids_T, scfm.pp.encode(renamed, model).gene_ids_T)
    with pytest.raises(VocabularyMismatchError, match="0 of its 40 names can be translated"):
        run(paths[1:], tmp_path / "other")


def test_gene_embeddings_start_from_loadings(files, tmp_path, monkeypatch):
    """With a learning rate of almost 0, the embedding is the start: scaled loadings, or random numbers."""
    config = CONFIG.replace(n_steps=1, learning_rate=1e-12)
    svd, random = (run(files, tmp_path / str(init), config, init=init) for init in ("svd", None))
    found = statistics_for(files, n_components=50)
    genes = svd.encoding.vocabulary.gene_ids
    weight, other = (model.network.embedding.gene.weight.detach().numpy() for model in (svd, random))
    n_components = found.loadings_VR.shape[1]
    scaled = found.loadings_VR / np.sqrt((found.loadings_VR**2).mean(0))
    expected = 0.3 * np.sign(scaled) * np.sqrt(np.abs(scaled))
    np.testing.assert_allclose(weight[genes, :n_components], expected[genes], atol=1e-4)
    np.testing.assert_allclose(weight[:, n_components:], other[:, n_components:], atol=1e-6)
    assert np.abs(weight[genes, :n_components] - other[genes, :n_components]).mean() > 0.1


def test_a_model_is_trained_further_and_stays_as_it_was(files, tmp_path):
    base = run(files, tmp_path / "base")
    before = base.id
    again = run(files[1:], tmp_path / "more", init=base)
    assert base.id == before != again.id
    assert again.encoding.vocabulary == base.encoding.vocabulary
    np.testing.assert_array_equal(again.encoding.medians, base.encoding.medians)
    assert [stage["config"]["init"] for stage in again.history["stages"]] == ["svd", f"model {before}"]
    slow = run(files, tmp_path / "slow", CONFIG.replace(n_steps=1, learning_rate=1e-12), init=tmp_path / "base/model")
    torch.testing.assert_close(slow.network.state_dict(), base.network.state_dict(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="whose encoding cannot be changed"):
        run(files, tmp_path / "other", init=base, encoding="rank")


def test_a_model_with_labels_loses_them_when_its_pretraining_continues(tmp_path):
    adata = scfm.datasets.pbmc()[:100].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    labeled = scfm.fit(
        adata, labels_key="bulk_labels", config=CONFIG.replace(n_steps=2), baselines=False, progress=False
    )
    model = run([tmp_path / "cells.h5ad"], tmp_path / "run", CONFIG.replace(n_steps=1), init=labeled)
    assert labeled.labels
    assert not model.labels
    assert not any("class" in name for name in model.network.state_dict())


@pytest.mark.parametrize("how", ["fraction", "files"])
def test_validation_cells_are_held_out_and_the_best_weights_kept(files, tmp_path, how):
    class Spoil(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 4:
                self.at_four = copy.deepcopy(module.network.state_dict())
            if trainer.global_step == 5:
                with torch.no_grad():
                    module.network.embedding.gene.weight.mul_(50.0)

    spoil, config = Spoil(), CONFIG.replace(validate_every=2)
    paths, validation = (files, 0.2) if how == "fraction" else (files[:1], files[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", functools.partial(train, callbacks=[spoil]))
        model = run(paths, tmp_path / "run", config, validation=validation)
    stage = model.history["stages"][0]
    steps, losses = zip(*stage["validation_losses"])
    assert steps == (2, 4, 6)
    assert min(losses) == losses[1]
    assert all(torch.equal(tensor, spoil.at_four[name]) for name, tensor in model.network.state_dict().items())
    table = pd.read_csv(tmp_path / "run" / "losses.csv", index_col="step")
    assert table["validation_loss"].dropna().index.tolist() == [2, 4, 6]
    assert table["validation_loss"].dropna().tolist() == pytest.approx(losses)


@pytest.mark.parametrize(
    ("validation", "match"), [(1.5, "between 0 and 1"), (0, "between 0 and 1"), (["a.h5ad"], "Remove it from one")]
)
def test_validation_that_cannot_be_is_refused(files, tmp_path, validation, match):
    named = [tmp_path / name for name in validation] if isinstance(validation, list) else validation
    with pytest.raises(ValueError, match=match):
        run(files, tmp_path / "run", validation=named)


class StopAt(lightning.Callback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


BROKEN = [
    {},
    {"encoding": "bin", "objective": "generative"},
    {"validation": 0.2},
    {"objective": "profile", "validation": 0.2},
]


@pytest.mark.parametrize("changes", BROKEN)
def test_a_run_stopped_by_sigterm_loses_no_step_and_resumes_to_the_same_weights(files, tmp_path, monkeypatch, changes):
    complete = run(files, tmp_path / "complete", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", functools.partial(train, callbacks=[StopAt(5, signal.SIGTERM)]))
        with pytest.raises(SystemExit) as stopped:
            run(files, tmp_path / "broken", **changes)
    checkpoints = tmp_path / "broken" / "checkpoints"
    assert stopped.value.code == 143
    assert stopped.value.__notes__ == [f"Checkpoints are in {checkpoints}; the same call resumes from the newest."]
    assert {path.name for path in checkpoints.iterdir()} >= {"step=4.ckpt", "step=5.ckpt"}
    resumed = run(files, tmp_path / "broken", CONFIG.replace(checkpoint_every=3), **changes)
    assert complete.id == resumed.id


def test_ctrl_c_keeps_a_model_and_the_same_call_resumes(files, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", functools.partial(train, callbacks=[StopAt(3, signal.SIGINT)]))
        with pytest.warns(UserWarning, match="Interrupted after 3 of 6 steps"):
            model = run(files, tmp_path / "run")
    signal.signal(signal.SIGINT, before)
    assert len(model.history["stages"][0]["losses"]) == 3
    assert scfm.load(tmp_path / "run" / "model").id == model.id
    assert run(files, tmp_path / "run").id == run(files, tmp_path / "complete").id


def test_a_finished_run_is_trained_further_with_more_steps(files, tmp_path):
    first = run(files, tmp_path / "run", CONFIG.replace(schedule="constant"))
    more = run(files, tmp_path / "run", CONFIG.replace(schedule="constant", n_steps=9))
    losses = [model.history["stages"][0]["losses"] for model in (first, more)]
    assert losses[1][:6] == losses[0]
    assert len(losses[1]) == 9


def test_a_folder_with_another_run_is_refused_and_the_difference_named(files, tmp_path):
    run(files, tmp_path / "run")
    with pytest.raises(ValueError, match=r"config\.learning_rate: 0\.0003, now 0\.1"):
        run(files, tmp_path / "run", CONFIG.replace(learning_rate=0.1))
    with pytest.raises(ValueError, match=r"init: 'svd', now None"):
        run(files, tmp_path / "run", init=None)
    with pytest.raises(ValueError, match=r"data: b\.h5ad"):
        run(files[:1], tmp_path / "run")


def test_changed_counts_under_the_same_name_and_size_are_noticed(files, tmp_path):
    run(files, tmp_path / "run")
    size = files[0].stat().st_size
    adata = anndata.read_h5ad(files[0])
    adata.X.data = np.roll(adata.X.data, 1)
    adata.write_h5ad(files[0])
    assert files[0].stat().st_size == size
    with pytest.raises(ValueError, match=r"data: a\.h5ad"):
        run(files, tmp_path / "run")


def test_a_damaged_record_is_refused_with_the_way_out(files, tmp_path):
    run(files, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"pretrain": {"pre')
    with pytest.raises(ModelFileError, match=r"is not the record of a run.*choose another output folder"):
        run(files, tmp_path / "run")


def test_two_runs_in_one_folder_are_refused(files, tmp_path):
    with output_lock(tmp_path / "run"), pytest.raises(OutputError, match="is being written by"):
        run(files, tmp_path / "run")


def test_a_published_vocabulary_and_medians_are_used(files, tmp_path):
    vocabulary = scfm.Vocabulary.from_genes([f"GENE{number}" for number in range(55)], special=["pad", "mask"])
    medians = np.where(np.arange(57) < 2, np.nan, 2.0)
    model = run(files, tmp_path / "run", vocabulary=vocabulary, medians=medians)
    assert model.encoding.vocabulary == vocabulary
    np.testing.assert_array_equal(model.encoding.medians, medians)
    with pytest.raises(ValueError, match="Pass the `vocabulary` that"):
        run(files, tmp_path / "other", medians=medians)


def test_files_without_counts_are_refused(tmp_path):
    path = tmp_path / "empty.h5ad"
    anndata.AnnData(sparse.csr_matrix((5, 9), dtype=np.float32)).write_h5ad(path)
    with pytest.raises(CountsError, match="All counts of the files are zero"):
        run([path], tmp_path / "run")


# Each family's shape with one thin layer, so that a step takes a moment.
THIN = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 16}


@pytest.mark.parametrize(
    ("preset", "objective", "expected"),
    [
        ("geneformer-v1-10m", None, "masked_genes"),
        ("scgpt-human", None, "generative"),
        ("scgpt-human", "masked", "masked_values"),
        ("scbert", None, "masked_buckets"),
        ("scfoundation", None, "read_depth"),
    ],
)
def test_a_published_shape_is_pretrained_in_its_own_way(files, tmp_path, monkeypatch, preset, objective, expected):
    attention = {"kind": "linear", "qkv_bias": False, "head_width": 8}
    decoder = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 64, "attention": attention}
    parts = {"scbert": {"attention": {"head_width": None}}, "scfoundation": {"decoder": decoder}}

    def thin(name, **wanted):
        found = families.choose_preset(name, **wanted)
        return replace(found, network=families.merged(found.network, THIN, parts.get(preset, {})))

    monkeypatch.setattr(start, "choose_preset", thin)
    model = run(files, tmp_path / "run", CONFIG.replace(n_steps=2), preset=preset, objective=objective)
    assert model.history["stages"][0]["objective"] == expected
    loaded = scfm.load(tmp_path / "run" / "model")
    embedding = scfm.tl.embed(anndata.read_h5ad(files[0]), loaded, copy=True).obsm["X_scfm"]
    assert embedding.shape == (60, loaded.network.config.d_embedding)
    assert np.isfinite(embedding).all()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"objective": "generative"}, "encoding=.bin."),
        ({"objective": "generative", "preset": "geneformer-v1-10m"}, "encoding=.bin."),
        ({"preset": "tiny"}, "choose one of small"),
        ({"preset": "scbert", "encoding": "rank"}, "has 'bucket'"),
        ({"objective": "causal"}, "choose one of masked, generative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(files, tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match):
        run(files, tmp_path / "run", **wrong)


def test_one_path_is_a_list_of_one(files, tmp_path):
    short = CONFIG.replace(n_steps=1)
    one, many = run(str(files[0]), tmp_path / "one", short), run(files[:1], tmp_path / "many", short)
    assert one.id == many.id
    one, many = (
        run(files[0], tmp_path / name, short, validation=validation)
        for name, validation in (("x", files[1]), ("y", [files[1]]))
    )
    assert one.history["stages"] == many.history["stages"]


def test_what_a_model_to_continue_has_already_is_refused(files, tmp_path):
    model = run(files, tmp_path / "first", CONFIG.replace(n_steps=1))
    with pytest.raises(ValueError, match="Omit `preset`"):
        run(files, tmp_path / "second", init=model, preset="small")
