"""`scfm.fit`: repeatable, the same on every backend, strict about labels, its results survive a file."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import scfm
from scfm import baselines
from scfm.annotation.calibration import fit_temperature
from scfm.errors import LabelsError, VocabularyMismatchError
from scfm.models import generate

SHORT = scfm.FitConfig(n_steps=2, tokens_per_step=2048)


@pytest.fixture(scope="module")
def blood():
    adata = scfm.datasets.pbmc()
    common = adata.obs["bulk_labels"].isin(["CD14+ Monocyte", "CD19+ B", "Dendritic"])
    return adata[common.to_numpy()][:160].copy()


@pytest.fixture(scope="module")
def fitted(blood):
    adata = blood.copy()
    return adata, scfm.fit(adata, labels_key="bulk_labels", config=SHORT, pretrain_config=SHORT, progress=False)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(blood, fitted):
    adata, model = fitted
    again = blood.copy()
    assert scfm.fit(again, labels_key="bulk_labels", config=SHORT, pretrain_config=SHORT, progress=False).id == model.id
    np.testing.assert_array_equal(again.obsm["X_scfm"], adata.obsm["X_scfm"])
    other = scfm.fit(
        blood.copy(),
        labels_key="bulk_labels",
        config=SHORT.replace(seed=1),
        pretrain_config=SHORT.replace(seed=1),
        seed=1,
        progress=False,
    )
    assert other.id != model.id


def test_generative_pretraining_leaves_a_model_that_generates(blood):
    config = SHORT.replace(n_steps=3)
    model, plain = (
        scfm.fit(blood[:60].copy(), encoding="bin", objective=objective, config=config, progress=False)
        for objective in ("generative", "masked")
    )
    assert model.history["stages"][0]["objective"] == "generative"
    assert model.history["stages"][0]["losses"] != plain.history["stages"][0]["losses"]
    prompt = scfm.pp.encode(blood[:2], model.encoding)
    values = generate(model.network, prompt, prompt.replace(values_T=None), n_steps=2)
    assert values.shape == (prompt.n_tokens,)
    assert bool(values.isfinite().all())


def test_generation_from_ranks_is_refused(blood):
    with pytest.raises(ValueError, match=r"'rank'.*encoding='bin'"):
        scfm.fit(blood.copy(), objective="generative")


@pytest.mark.slow
@pytest.mark.skipif(not scfm.ops.extension_info()["available"], reason="needs the compiled extension")
def test_twenty_losses_agree_between_compiled_and_torch_attention(blood, monkeypatch):
    from scfm.models.network import CellTransformer

    config = scfm.FitConfig(n_steps=20, tokens_per_step=2048)
    start = CellTransformer.__init__

    def losses(backend):
        def with_backend(network, *arguments, **named):
            start(network, *arguments, **named)
            network.set_attention_backend(backend)

        monkeypatch.setattr(CellTransformer, "__init__", with_backend)
        model = scfm.fit(blood.copy(), config=config, progress=False)
        return np.array(model.history["stages"][0]["losses"])

    compiled, reference = losses("fused"), losses("torch")
    assert len(compiled) == 20
    np.testing.assert_allclose(compiled, reference, rtol=1e-4)


def test_cells_without_a_label_are_fitted_on_but_neither_trained_nor_tested(blood):
    adata = blood.copy()
    adata.obs["bulk_labels"] = adata.obs["bulk_labels"].astype(object)
    adata.obs.iloc[:20, adata.obs.columns.get_loc("bulk_labels")] = np.nan
    scfm.fit(adata, labels_key="bulk_labels", config=SHORT, pretrain_config=SHORT, progress=False)
    assert (adata.obs["scfm_split"][:20] == "unlabeled").all()
    assert not (adata.obs["scfm_split"][20:] == "unlabeled").any()
    assert np.isfinite(adata.obsm["X_scfm"]).all()


def test_columns_of_one_gene_are_summed_where_the_encoding_says_so(blood):
    adata = blood[:60].copy()
    adata.var_names = [adata.var_names[0], *adata.var_names[:-1]]
    with pytest.raises(VocabularyMismatchError, match=r'EncodingConfig.*duplicates="sum"'):
        scfm.fit(adata, encoding="bin", config=SHORT, progress=False)
    encoding = scfm.EncodingConfig(kind="bin", duplicates="sum")
    model = scfm.fit(adata, encoding=encoding, context_length=300, config=SHORT, progress=False)
    assert model.encoding.config == encoding.replace(context_length=300, depth_key="n_counts")  # that of the data set
    assert adata.obsm["X_scfm"].shape[0] == 60


def test_a_missing_labels_key_is_named_with_the_nearest_one(blood):
    with pytest.raises(LabelsError, match="Did you mean 'bulk_labels'"):
        scfm.fit(blood.copy(), labels_key="bulk_label", progress=False)


def test_results_survive_writing_and_reading(fitted, tmp_path):
    adata, model = fitted
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(read.obsm["X_scfm"], adata.obsm["X_scfm"])
    assert read.uns["scfm"]["X_scfm"]["model_id"] == model.id
    assert list(read.obs["scfm_split"]) == list(adata.obs["scfm_split"])


def test_a_saved_model_predicts_the_same(fitted, tmp_path):
    adata, model = fitted
    model.save(tmp_path / "model")
    loaded = scfm.load(tmp_path / "model")
    before, after = (scfm.tl.annotate(adata, m, copy=True).obsm["scfm_proba"] for m in (model, loaded))
    np.testing.assert_array_equal(after, before)
    pd.testing.assert_frame_equal(loaded.report(), model.report())


def test_the_report_holds_the_model_beside_baselines_and_says_who_saw_test_cells(fitted):
    report = fitted[1].report()
    assert {"scfm", "scfm, transformer alone", "majority class", "logistic regression (balanced)"} <= set(report.index)
    transductive = report.index[report["setting"] == "transductive"]
    assert list(transductive) == ["SVD-50 of all cells + logistic regression (balanced)"]
    assert report[["accuracy", "macro_f1", "ece"]].apply(lambda column: column.between(0, 1).all()).all()


def test_report_and_embedding_are_what_the_finished_model_gives(fitted):
    adata, model = fitted
    cells, expression = scfm.pp.encode(adata, model), scfm.pp.log_expression(adata, model)
    np.testing.assert_array_equal(model.embed(cells), adata.obsm["X_scfm"])
    rows = np.flatnonzero(adata.obs["scfm_split"] == "test")
    truth = pd.Categorical(adata.obs["bulk_labels"].iloc[rows], categories=model.labels).codes
    for method, read in (("scfm", expression[rows]), ("scfm, transformer alone", None)):
        proba = model.predict_proba(cells.select(rows), read)
        expected = baselines.score_proba(proba, np.asarray(model.labels), truth)
        assert model.report().loc[method, list(expected)].to_dict() == pytest.approx(expected)


def test_temperatures_come_from_the_calibration_cells_alone(fitted):
    adata, model = fitted
    rows = np.flatnonzero(adata.obs["scfm_split"] == "calibration")
    truth = pd.Categorical(adata.obs["bulk_labels"].iloc[rows], categories=model.labels).codes
    cells = scfm.pp.encode(adata, model)
    assert model.calibration.n_cells == len(rows)
    proba = model.predict_proba(cells.select(rows), calibrated=False)
    expected = fit_temperature(proba, truth.astype(np.int64))
    assert expected != 1
    assert model.calibration.transformer_temperature == pytest.approx(expected, rel=1e-3)
    # That of the ensemble was fitted before the regressions learned from these cells.
    assert model.calibration.ensemble_temperature > 0.3


def test_rows_of_a_transductive_fit_say_so_and_test_labels_are_not_read(blood):
    def fit(labels):
        adata = blood.copy()
        adata.obs["held"] = np.arange(adata.n_obs) % 5 == 0
        adata.obs["bulk_labels"] = labels
        settings = {"test_key": "held", "transductive": True, "baselines": False, "pretrain": False}
        return scfm.fit(adata, labels_key="bulk_labels", config=SHORT, progress=False, **settings)

    labels = blood.obs["bulk_labels"].astype(str).to_numpy()
    turned = np.where(np.arange(len(labels)) % 5 == 0, np.roll(labels, 1), labels)
    model, other = fit(labels), fit(turned)
    assert set(model.report()["setting"]) == {"transductive"}
    assert list(model.report().index) == ["scfm", "scfm, transformer alone"]
    assert other.id == model.id
    assert other.calibration == model.calibration
    assert other.report()["accuracy"].iloc[0] != model.report()["accuracy"].iloc[0]


def test_training_randomness_leaves_the_global_generator_alone(blood):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    scfm.fit(blood[:60].copy(), config=SHORT, progress=False)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def losses(model):
    return [stage["losses"] for stage in model.history["stages"]]


def test_the_seed_of_a_config_governs_training_and_without_one_that_of_the_call(blood):
    def fit(of_call, **config):
        return scfm.fit(blood[:40].copy(), config=SHORT.replace(**config), seed=of_call, progress=False)

    assert fit(3).id == fit(3, seed=3).id
    assert losses(fit(3)) != losses(fit(3, seed=4))
    assert fit(3).history["stages"][0]["config"]["seed"] == 3


def test_a_model_is_trained_without_labels_too(blood, fitted):
    before = scfm.fit(blood[:40].copy(), config=SHORT, progress=False)
    after = scfm.fit(blood[:40].copy(), model=before, config=SHORT, progress=False)
    assert after.id != before.id
    assert [stage["name"] for stage in after.history["stages"]] == ["pretraining", "pretraining"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pretrain": False, "config": SHORT}, "nothing would be trained"),
        ({"pretrain_config": SHORT}, "without labels, `config` holds the settings"),
        ({"labels_key": "bulk_labels", "pretrain": False, "pretrain_config": SHORT}, "the fit does not pretrain"),
    ],
)
def test_settings_of_a_stage_that_does_not_take_place_are_refused(blood, arguments, words):
    with pytest.raises(ValueError, match=words):
        scfm.fit(blood.copy(), progress=False, **arguments)


@pytest.mark.parametrize("labels_key", [None, "bulk_labels"])
def test_a_file_gives_the_model_of_its_cells_in_memory(tmp_path, labels_key):
    adata = scfm.datasets.pbmc()[:150].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    config = scfm.FitConfig(n_steps=1, tokens_per_step=1024)
    models = [
        scfm.fit(cells, labels_key=labels_key, config=config, context_length=32, progress=False)
        for cells in (adata, tmp_path / "cells.h5ad")
    ]
    assert models[0].id == models[1].id
    assert (tmp_path / "cells.h5ad").read_bytes() == content
    if labels_key:
        pd.testing.assert_frame_equal(models[0].report(), models[1].report())
