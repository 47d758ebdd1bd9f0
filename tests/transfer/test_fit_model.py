"""`scfm.fit(model=)`: from every family and from our own models, leaving what was given as it was."""

import json
import subprocess
import sys

import numpy as np
import pytest

import scfm

SHORT = scfm.FitConfig(n_steps=3, tokens_per_step=1024, learning_rate=1e-3)


def fitted(model, adata, **options):
    options = {"labels_key": "bulk_labels", "config": SHORT, "baselines": False, "progress": False} | options
    return scfm.fit(adata.copy(), model=model, **options)


def test_a_fit_keeps_encoding_and_vocabulary_and_leaves_the_model_as_it_was(kind, small_model, cells_and_genes):
    model = small_model(kind)
    before, weights = model.id, {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    result = fitted(model, cells_and_genes)
    assert model.id == before
    assert model.labels == ()
    assert all(tensor.equal(weights[name]) for name, tensor in model.network.state_dict().items())
    assert set(model.network.state_dict()) == set(weights)
    assert result.id != before
    assert result.encoding.vocabulary.tokens == model.encoding.vocabulary.tokens
    assert result.encoding.config == model.encoding.config
    if model.encoding.medians is not None:
        np.testing.assert_array_equal(result.encoding.medians, model.encoding.medians)
    assert len(result.labels) == cells_and_genes.obs["bulk_labels"].nunique()
    assert not result.network.state_dict()["blocks.0.feed_forward.up.weight"].equal(
        weights["blocks.0.feed_forward.up.weight"]
    )


@pytest.mark.parametrize("trainable", ["head", "last:1", "lora:2"])
def test_a_part_of_the_weights_can_be_fine_tuned(kind, small_model, cells_and_genes, trainable):
    model = small_model(kind)
    result = fitted(model, cells_and_genes, config=SHORT.replace(trainable=trainable))
    before, after = model.network.state_dict(), result.network.state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    last = "blocks.1." if kind.startswith("geneformer") else "blocks.2."  # whose embedding leaves the last block out
    allowed = {"head": (), "last:1": (last,), "lora:2": ("blocks.",)}[trainable]
    assert {name for name in changed if not name.startswith(allowed)} == set()
    assert bool(changed) == bool(allowed)


def test_saved_fits_annotate_the_same_in_a_fresh_process(every_kind, small_model, cells_and_genes, tmp_path):
    cells_and_genes.write_h5ad(tmp_path / "cells.h5ad")
    expected = {}
    for kind in every_kind:
        result, here = fitted(small_model(kind), cells_and_genes), cells_and_genes.copy()
        result.save(tmp_path / kind)
        scfm.tl.annotate(here, result)
        expected[kind] = [here.obs["scfm_label"].astype(str).tolist(), here.obs["scfm_confidence"].tolist()]
    script = (
        "import anndata, json, sys, pathlib, scfm\n"
        "folder, *kinds = sys.argv[1:]\n"
        "found = {}\n"
        "for kind in kinds:\n"
        "    adata = anndata.read_h5ad(pathlib.Path(folder) / 'cells.h5ad')\n"
        "    scfm.tl.annotate(adata, scfm.load(pathlib.Path(folder) / kind))\n"
        "    found[kind] = [adata.obs['scfm_label'].astype(str).tolist(), adata.obs['scfm_confidence'].tolist()]\n"
        "print(json.dumps(found))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path, *every_kind], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout.strip().splitlines()[-1]) == expected


@pytest.mark.parametrize("form", ["object", "folder", "path in words"])
def test_a_model_is_given_as_an_object_or_as_its_folder(small_model, cells_and_genes, tmp_path, form):
    model = small_model("rank, mean")
    model.save(tmp_path / "model")
    given = {"object": model, "folder": tmp_path / "model", "path in words": str(tmp_path / "model")}[form]
    assert fitted(given, cells_and_genes).id == fitted(model, cells_and_genes).id
    assert scfm.load(tmp_path / "model").id == model.id


def test_a_published_checkpoint_is_fine_tuned_from_its_folder(small_model, cells_and_genes, tmp_path):
    model = small_model("geneformer v2")
    model.save(tmp_path / "ours")
    scfm.families.convert(tmp_path / "ours", tmp_path / "theirs", to="geneformer")
    result = fitted(tmp_path / "theirs", cells_and_genes, config=SHORT.replace(trainable="head"))
    for name in ("embedding.gene.weight", "blocks.1.attention.qkv.weight"):
        assert result.network.state_dict()[name].equal(model.network.state_dict()[name])


def test_the_report_compares_the_fit_with_its_parts_and_with_simple_methods(small_model, cells_and_genes):
    result = fitted(small_model("rank, mean"), cells_and_genes, compare_from_scratch=True, baselines=True)
    rows = list(result.report().index)
    assert rows[:4] == [
        "scfm",
        "scfm, transformer alone",
        "linear probe on the frozen embedding",
        "same architecture from scratch",
    ]
    assert {"logistic regression", "SVD-50 of all cells + logistic regression (balanced)"} <= set(rows)


@pytest.mark.parametrize("kind", ["geneformer v1", "scgpt", "scfoundation", "rank, mean"])
def test_genes_that_the_model_lacks_are_ignored_or_added(small_model, cells_and_genes, kind):
    known = cells_and_genes.var_names[:50]
    few = scfm.encoding.make_encoding(small_model(kind).encoding.config, adata=cells_and_genes[:, known])
    config = small_model(kind).network.config.replace(n_tokens=len(few.vocabulary), pad_id=few.vocabulary.pad_id)
    network = scfm.models.CellTransformer.for_vocabulary(config, few.vocabulary)
    model = scfm.Model(network, few)
    before = model.id
    assert fitted(model, cells_and_genes).encoding.vocabulary.tokens == few.vocabulary.tokens
    extended = fitted(model, cells_and_genes, extend_vocabulary=True, config=SHORT.replace(trainable="head"))
    tokens = extended.encoding.vocabulary.tokens
    assert tokens[: len(few.vocabulary)] == few.vocabulary.tokens
    assert set(tokens[len(few.vocabulary) :]) == set(cells_and_genes.var_names[50:])
    weight_VD = extended.network.embedding.gene.weight.detach()
    assert weight_VD[: len(few.vocabulary)].equal(network.embedding.gene.weight.detach())
    assert (weight_VD[len(few.vocabulary) :].std(1) > 0).all()
    assert model.id == before
    cells = scfm.pp.encode(cells_and_genes, extended)
    assert int(cells.gene_ids_T.max()) >= len(few.vocabulary)


def test_a_fixed_panel_cannot_be_extended(small_model, cells_and_genes):
    model = small_model("scbert")
    wider = cells_and_genes.copy()
    wider.var_names = [*wider.var_names[:-1], "NEW_GENE"]
    with pytest.raises(scfm.errors.ModelTaskError, match="fixed set of genes"):
        fitted(model, wider, extend_vocabulary=True)


def test_pretraining_is_continued_on_the_new_cells_first(kind, small_model, cells_and_genes):
    model = small_model(kind)
    before = model.id
    result = fitted(model, cells_and_genes, pretrain=True, pretrain_config=SHORT)
    assert [stage["name"] for stage in result.history["stages"]] == ["pretraining", "fine-tuning"]
    assert model.id == before
