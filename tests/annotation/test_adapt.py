"""`scfm.annotation.adapt`: probabilities and novelty predicted again with the help of the other cells."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

import scfm
from scfm.annotation.adapt import INVERSE_PENALTY, N_COMPONENTS, N_SHIFTS, adapted_probabilities, without_common_shift
from scfm.annotation.gene_classifier import expression_components
from scfm.annotation.novelty import common_shift, group_novelty

N_CELLS, N_GENES, N_CLASSES = 1000, 120, 3


@pytest.fixture(scope="module")
def groups():
    """Log-expression of three groups of cells that differ in a quarter of the genes each, and the group of each cell."""
    rng = np.random.default_rng(0)
    group_B = rng.integers(0, N_CLASSES, N_CELLS)
    rate_CV = np.full((N_CLASSES, N_GENES), 0.4)
    for group in range(N_CLASSES):
        rate_CV[group, group * 30 : group * 30 + 30] = 3.0
    return sparse.csr_matrix(np.log1p(rng.poisson(rate_CV[group_B]).astype(float))), group_B


def test_the_regression_is_that_of_scikit_learn_on_weighted_copies(groups):
    expression_BV, _ = groups
    proba_BC = np.random.default_rng(1).dirichlet(np.ones(N_CLASSES), N_CELLS)
    (component_BR,) = expression_components(expression_BV, n_components=50)
    adapted = adapted_probabilities(proba_BC, component_BR)
    component_BR = component_BR - component_BR.mean(0)
    component_BR /= np.sqrt((component_BR**2).mean())
    oracle = LogisticRegression(C=INVERSE_PENALTY, tol=1e-8, max_iter=5000).fit(
        np.repeat(component_BR, N_CLASSES, axis=0),
        np.tile(np.arange(N_CLASSES), N_CELLS),
        sample_weight=proba_BC.ravel(),
    )
    np.testing.assert_allclose(adapted, oracle.predict_proba(component_BR), atol=1e-3)


def test_errors_that_have_nothing_to_do_with_the_expression_are_corrected(groups):
    expression_BV, group_B = groups
    rng = np.random.default_rng(2)
    wrong_B = rng.random(N_CELLS) < 0.2
    said_B = np.where(wrong_B, (group_B + rng.integers(1, N_CLASSES, N_CELLS)) % N_CLASSES, group_B)
    proba_BC = np.where(np.arange(N_CLASSES) == said_B[:, None], 0.8, 0.1)
    adapted = adapted_probabilities(proba_BC, *expression_components(expression_BV, n_components=N_COMPONENTS))
    assert adapted.shape == proba_BC.shape
    assert adapted.dtype == np.float32
    np.testing.assert_allclose(adapted.sum(1), 1, rtol=1e-5)
    assert (said_B == group_B).mean() < 0.85
    assert (adapted.argmax(1) == group_B).mean() > 0.95


@pytest.fixture(scope="module")
def blood():
    """A model of 700 blood cells, and the cells."""
    adata = scfm.datasets.pbmc()
    quick = {"context_length": 32, "baselines": False, "pretrain": False, "progress": False}
    return adata, scfm.fit(adata, labels_key="bulk_labels", config=scfm.FitConfig(n_steps=1), **quick)


def test_annotate_adapts_only_when_asked_and_with_enough_cells(blood):
    adata, model = blood
    plain, adapted = (scfm.tl.annotate(adata, model, adapt=adapt, copy=True, progress=False) for adapt in (False, True))
    expression_BV = scfm.pp.log_expression(adata, model.encoding)
    (component_BR,) = expression_components(expression_BV, n_components=N_COMPONENTS)
    proba_BC, shift_V = without_common_shift(model, plain.obsm["scfm_proba"], expression_BV)
    expected = adapted_probabilities(proba_BC, component_BR)
    np.testing.assert_array_equal(adapted.obsm["scfm_proba"], expected)
    assert (plain.obsm["scfm_proba"] != expected).any()
    np.testing.assert_array_equal(plain.obs["scfm_novelty"], model.network.novelty(expression_BV))
    expected = group_novelty(model.network.novelty, expression_BV, component_BR, shift_V=shift_V)
    np.testing.assert_array_equal(adapted.obs["scfm_novelty"], expected)
    with pytest.raises(ValueError, match="50 are too few; it needs 100"):
        scfm.tl.annotate(adata[:50].copy(), model, adapt=True)


def toward(model, label, amount):
    """A shift of expression that raises the logit of one label most."""
    weight_V = model.network.gene_classifier.weight_VC[:, label].double().numpy()
    weight_V = np.maximum(weight_V * (model.network.novelty.weight_V.numpy() > 0), 0)  # no expression below 0
    return amount * weight_V / np.linalg.norm(weight_V)


def test_without_common_shift_equals_the_model_on_shifted_cells(blood):
    adata, model = blood
    # No value is clipped, so the linear members see the shift as it is.
    moved_BV = sparse.csr_matrix(0.5 * scfm.pp.log_expression(adata, model.encoding).toarray() + toward(model, 2, 2.0))
    cells = scfm.pp.encode(adata, model)
    plain_BC = expected_BC = model.predict_proba(cells, moved_BV)
    found_BC, shift_V = without_common_shift(model, plain_BC, moved_BV)
    for _ in range(N_SHIFTS):
        expected_V = common_shift(model.network.novelty, moved_BV, expected_BC.argmax(1))
        expected_BC = model.predict_proba(cells, sparse.csr_matrix(moved_BV.toarray() - expected_V))
    np.testing.assert_allclose(shift_V, expected_V, atol=1e-6)
    np.testing.assert_allclose(found_BC, expected_BC, atol=1e-4)
    assert np.abs(found_BC - plain_BC).mean() > 0.01


def test_a_shift_of_all_classes_is_found_and_ignored(blood):
    adata, model = blood
    cells, truth = scfm.pp.encode(adata, model), adata.obs["bulk_labels"].astype(str).to_numpy()
    moved_BV = sparse.csr_matrix(scfm.pp.log_expression(adata, model.encoding).toarray() + toward(model, 2, 8.0))
    proba_BC = model.predict_proba(cells, moved_BV)
    right = {
        name: (np.array(model.labels)[of_BC.argmax(1)] == truth).mean()
        for name, of_BC in (("plain", proba_BC), ("adapted", without_common_shift(model, proba_BC, moved_BV)[0]))
    }
    assert right["plain"] < 0.6
    assert right["adapted"] > 0.85


def test_a_warning_says_that_all_cells_are_foreign(blood, caplog):
    adata, model = blood
    known = adata[adata.obs["scfm_split"].isin(["calibration", "test"])].copy()
    scfm.tl.annotate(known, model, adapt=True, copy=True, progress=False)
    assert "omit `adapt`" not in caplog.text
    rng = np.random.default_rng(0)
    foreign = known.copy()
    foreign.X = sparse.csr_matrix(rng.permuted(foreign.X.toarray(), axis=1))
    foreign.uns.pop("scfm", None)
    scfm.tl.annotate(foreign, model, adapt=True, copy=True, progress=False)
    assert "If the model does not know their tissue, omit `adapt`" in caplog.text


def test_the_threshold_is_that_of_the_novelty_that_is_shown(blood, caplog):
    adata, model = blood
    adata = adata[adata.obs["scfm_split"].isin(["calibration", "test"])].copy()
    limits = {False: model.calibration.novelty_threshold, True: model.calibration.group_novelty_threshold}
    assert limits[False] != limits[True]
    for adapt, limit in limits.items():
        rejected = scfm.tl.annotate(adata, model, adapt=adapt, max_novelty="calibrated", copy=True, progress=False).obs
        np.testing.assert_array_equal(rejected["scfm_label"] == "unassigned", rejected["scfm_novelty"] > limit)
        assert 0 < (rejected["scfm_novelty"] > limit).sum() < adata.n_obs / 5
        with caplog.at_level("INFO", logger="scfm"):
            scfm.tl.annotate(adata, model, adapt=adapt, copy=True, progress=False)
        assert f"{(rejected['scfm_novelty'] > limit).sum()} of {adata.n_obs} cells" in caplog.text


def test_a_model_without_a_threshold_for_groups_keeps_the_novelty_of_single_cells(blood, tmp_path):
    adata, model = blood
    model.save(tmp_path / "model")
    assert scfm.load(tmp_path / "model").calibration == model.calibration
    older = scfm.load(tmp_path / "model")
    older.calibration = older.calibration.replace(group_novelty_threshold=None)
    assert "group_novelty_threshold" not in older.calibration.to_dict()  # as in files of earlier versions
    plain, adapted = (scfm.tl.annotate(adata, older, adapt=adapt, copy=True, progress=False) for adapt in (False, True))
    np.testing.assert_array_equal(plain.obs["scfm_novelty"], adapted.obs["scfm_novelty"])
    assert (plain.obsm["scfm_proba"] != adapted.obsm["scfm_proba"]).any()
