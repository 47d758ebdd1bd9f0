"""`scfm.tl.predict_perturbation`. Oracles: a simulator with known effects, scikit-learn's ridge, scores by hand."""

import anndata
import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import RidgeCV

import scfm
from scfm.errors import LabelsError
from scfm.perturbation.edits import Editor, TokenCell
from scfm.perturbation.prediction.features import with_gene
from scfm.perturbation.prediction.measured import Measured
from scfm.perturbation.prediction.methods import PENALTIES, additive, bilinear_ridge, ridge, ridge_on_features


def simulated(rng, *, interaction, n_genes=40, n_features=3):
    """Changes that are linear in known features of single genes, plus products for pairs."""
    names = [f"G{g}" for g in range(12)]
    features = {name: rng.normal(size=n_features) for name in names}
    single, product = rng.normal(size=(2, n_features, n_genes))
    pairs = [(a, b) for a in names for b in names if a < b][::2]

    def change(target):
        total = sum(features[g] @ single for g in target)
        return (
            total + interaction * np.prod([features[g] for g in target], axis=0) @ product if len(target) > 1 else total
        )

    targets = (*[(name,) for name in names], *pairs)
    changes = np.stack([change(target) for target in targets])
    genes = tuple(f"H{g}" for g in range(n_genes))
    return Measured(targets, changes, sparse.csr_matrix((1, n_genes)), np.zeros(1, int), genes), features


@pytest.mark.parametrize("interaction", [0.0, 1.0])
def test_known_interactions_of_unseen_pairs_are_found(interaction):
    measured, features = simulated(np.random.default_rng(0), interaction=interaction)
    place = len(measured.targets) - 1
    truth, target = measured.change_PG[place], measured.targets[place]
    ours = ridge_on_features(features)(measured.without(place), [target])[0]
    sum_of_singles = additive(measured.without(place), [target])[0]
    np.testing.assert_allclose(ours, truth, atol=0.05 * np.abs(truth).max())
    assert np.allclose(sum_of_singles, truth) == (interaction == 0.0)


def test_unseen_single_genes_are_predicted_from_features():
    measured, features = simulated(np.random.default_rng(1), interaction=0.0)
    ours = ridge_on_features(features)(measured.without(3), [measured.targets[3]])[0]
    np.testing.assert_allclose(ours, measured.change_PG[3], atol=0.05)


def test_ridge_agrees_with_scikit_learn():
    rng = np.random.default_rng(2)
    x, test = rng.normal(size=(20, 6)), rng.normal(size=(4, 6))
    y = x @ rng.normal(size=(6, 3)) + rng.normal(size=(20, 3))
    centred = x - x.mean(0)
    unit = (centred**2).sum() / len(x)
    oracle = RidgeCV(alphas=[penalty * unit for penalty in PENALTIES]).fit(x, y)
    np.testing.assert_allclose(ridge(x, y, test), oracle.predict(test), rtol=1e-6)


def test_bilinear_ridge_finds_a_bilinear_effect():
    """Genes that respond together do as targets what their row says; without penalty and noise the fit is exact."""
    rng = np.random.default_rng(3)
    names = tuple(f"G{g}" for g in range(12))
    random = rng.normal(size=(12, 2))
    axes = np.linalg.qr(random - random.mean(0))[0]
    changes = axes @ rng.normal(size=(2, 2)) @ axes.T
    measured = Measured(tuple((n,) for n in names), changes, sparse.csr_matrix((1, 12)), np.zeros(1, int), names)
    found = bilinear_ridge(measured, measured.targets, n_components=2, penalty=1e-9)
    np.testing.assert_allclose(found, changes, atol=1e-4)


def test_the_perturbed_gene_is_always_in_the_input():
    editor = Editor(kind="delete", n_front=1, n_back=1, context_length=5)
    cell = TokenCell(np.array([2, 10, 12, 11, 3], dtype=np.int32))
    assert with_gene(cell, 10, editor) is cell
    assert with_gene(cell, 99, editor).gene_ids_N.tolist() == [2, 10, 12, 99, 3]
    values = TokenCell(np.array([2, 10, 14], dtype=np.int32), np.array([-2, 3, 2], dtype=np.float32))
    put_in = with_gene(values, 12, Editor(kind="delete", ordered=False, n_front=1))
    assert put_in.gene_ids_N.tolist() == [2, 10, 12, 14]
    assert put_in.values_N.tolist() == [-2, 3, 2, 2]


@pytest.fixture(scope="module")
def screened():
    """Blood cells of which some are called knock-outs of a gene, and lose it."""
    adata = scfm.datasets.pbmc()[:240].copy()
    counts = adata.X.tolil()
    names = ["CD74", "CST3", "LYZ", "NKG7"]
    adata.obs["target"] = ["control"] * 80 + [names[cell % 4] for cell in range(160)]
    for cell in range(80, 240):
        counts[cell, adata.var_names.get_loc(adata.obs["target"].iloc[cell])] = 0
    adata.X = sparse.csr_matrix(counts)
    model = scfm.fit(adata[:80].copy(), config=scfm.FitConfig(n_steps=2, tokens_per_step=1024), progress=False)
    return adata, model


def test_every_score_stands_beside_its_baselines(screened):
    adata, model = screened
    scores = scfm.tl.score_perturbation_prediction(adata, model, perturbation_key="target", control="control")
    assert set(scores["method"]) == {"scfm", "no change", "train mean", "additive", "bilinear ridge"}
    assert len(scores) == 4 * 5
    assert scores.loc[scores["method"] == "no change", "pearson_top"].isna().all()
    assert scores["rmse"].gt(0).all()
    assert scores["rank"].dropna().between(0, 1).all()


def test_predictions_have_a_row_a_method_and_a_column_a_gene(screened):
    adata, model = screened
    table = scfm.tl.predict_perturbation(
        adata, model, perturbation_key="target", control="control", predict=["CD79A", "CD74+LYZ"]
    )
    assert table.loc["scfm"].shape == (2, adata.n_vars)
    assert list(table.loc["train mean"].index) == ["CD79A", "CD74+LYZ"]
    assert np.isfinite(table.to_numpy()).all()
    with pytest.raises(LabelsError, match="untouched"):
        scfm.tl.predict_perturbation(adata, model, perturbation_key="target", control="untouched", predict=["LYZ"])


def test_relatives_on_papalexi(scfm_data):
    """Measured knock-outs of the interferon-gamma pathway change expression alike; chance is a rank of 12 of 24."""
    from scfm.perturbation.prediction.measured import read_measured

    adata = anndata.read_h5ad(scfm_data / "papalexi_thp1_20729x299.h5ad")
    measured = read_measured(
        adata, perturbation_key="target_argmax", control="non-targeting", separator="+", layer=None
    )
    names = [target[0] for target in measured.targets]
    alike = np.corrcoef(measured.change_PG[:, ~np.isin(measured.genes, names)])
    pathway = {"STAT1", "JAK2", "IFNGR1", "IFNGR2"}
    for name in pathway:
        nearest = np.argsort(-alike[names.index(name)])[1:4]
        assert {names[place] for place in nearest} == pathway - {name}
