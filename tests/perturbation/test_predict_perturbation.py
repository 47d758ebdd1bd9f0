"""`scfm.tl.predict_perturbation`. Oracles: a simulator with known effects, scikit-learn's ridge, scores by hand."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import RidgeCV

import scfm
from scfm.errors import LabelsError, VocabularyMismatchError
from scfm.perturbation.edits import Editor, TokenCell
from scfm.perturbation.prediction.features import with_gene
from scfm.perturbation.prediction.measured import Measured, read_measured
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
    return Measured(targets, changes, genes), features


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
    centered = x - x.mean(0)
    unit = (centered**2).sum() / len(x)
    oracle = RidgeCV(alphas=[penalty * unit for penalty in PENALTIES]).fit(x, y)
    np.testing.assert_allclose(ridge(x, y, test), oracle.predict(test), rtol=1e-6)


def test_bilinear_ridge_finds_a_bilinear_effect():
    """Genes that respond together do as targets what their row says; without penalty and noise the fit is exact."""
    rng = np.random.default_rng(3)
    names = tuple(f"G{g}" for g in range(12))
    random = rng.normal(size=(12, 2))
    axes = np.linalg.qr(random - random.mean(0))[0]
    changes = axes @ rng.normal(size=(2, 2)) @ axes.T
    measured = Measured(tuple((n,) for n in names), changes, names)
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


KEYS = {"perturbation_key": "target", "control": "control"}


def relabeled(adata, name_of):
    """The same cells with other names of their perturbations."""
    changed = adata.copy()
    changed.obs["target"] = [name_of(cell, name) for cell, name in enumerate(adata.obs["target"])]
    return changed


def test_gears_names_mean_their_genes(screened):
    """Oracle: the same cells with plain names."""
    adata, model = screened
    gears = relabeled(
        adata, lambda cell, name: "ctrl" if name == "control" else f"{name}+ctrl" if cell % 2 else f"ctrl + {name}"
    )
    gears.obs.loc[gears.obs_names[0], "target"] = "ctrl+ctrl"
    plain = scfm.tl.predict_perturbation(adata, model, predict=["LYZ", "CD79A"], **KEYS)
    found = scfm.tl.predict_perturbation(
        gears, model, perturbation_key="target", control="ctrl", predict=["LYZ+ctrl", "ctrl+CD79A"]
    )
    np.testing.assert_array_equal(found.to_numpy(), plain.to_numpy())
    scores = scfm.tl.score_perturbation_prediction(gears, model, perturbation_key="target", control="ctrl")
    pd.testing.assert_frame_equal(scores, scfm.tl.score_perturbation_prediction(adata, model, **KEYS))


def test_the_order_of_genes_in_a_name_says_nothing(screened):
    adata, model = screened
    one = relabeled(adata, lambda cell, name: "CD74+CST3" if name == "NKG7" else name)
    other = relabeled(one, lambda cell, name: "CST3+CD74" if cell % 8 == 3 and "+" in name else name)
    assert {"CD74+CST3", "CST3+CD74"} < set(other.obs["target"])
    tables = [scfm.tl.score_perturbation_prediction(cells, model, **KEYS) for cells in (one, other)]
    assert set(tables[1]["perturbation"]) == {"CD74", "CST3", "LYZ", "CD74+CST3"}
    pd.testing.assert_frame_equal(*tables)
    pair = scfm.tl.predict_perturbation(other, model, predict=["CST3+LYZ", "LYZ+CST3"], **KEYS)
    np.testing.assert_array_equal(pair.xs("CST3+LYZ", level="perturbation"), pair.xs("LYZ+CST3", level="perturbation"))


def test_genes_are_found_by_the_names_that_gene_key_has(screened):
    """Oracle: the same data with these names in `var_names`."""
    adata, model = screened
    coded = adata.copy()
    coded.var["symbol"] = coded.var_names
    coded.var_names = [f"ENSG{gene:011d}" for gene in range(coded.n_vars)]
    for function, options in (
        (scfm.tl.predict_perturbation, {"predict": ["LYZ", "CD79A+NKG7"]}),
        (scfm.tl.score_perturbation_prediction, {}),
    ):
        plain = function(adata, model, **options, **KEYS)
        found = function(coded, model, gene_key="symbol", **options, **KEYS)
        np.testing.assert_array_equal(found.select_dtypes("number"), plain.select_dtypes("number"))
    assert list(found.columns) == list(plain.columns)


def test_perturbations_of_few_cells_are_left_out_and_named(screened):
    adata, model = screened
    rare = relabeled(adata, lambda cell, name: "CD79A" if cell in (236, 237) else name)
    with pytest.warns(UserWarning, match="1 perturbations have fewer than 5 cells and are left out: CD79A"):
        table = scfm.tl.score_perturbation_prediction(rare, model, **KEYS)
    assert table.attrs["left_out"] == {"CD79A": "2 cells"}
    assert "CD79A" not in set(table["perturbation"])


@pytest.mark.parametrize(
    ("predict", "error", "message"),
    [
        ("LYZ", ValueError, r"is the string 'LYZ'; pass a list"),
        ([], ValueError, "is empty"),
        (["control"], ValueError, "no gene except the control"),
        (["LYZ", "NOSUCHGENE"], VocabularyMismatchError, "1 genes .* 'NOSUCHGENE'"),
        (["lyz+CST3"], VocabularyMismatchError, r"'lyz'\. Did you mean 'LYZ'\?"),
    ],
)
def test_what_cannot_be_predicted_is_refused(screened, predict, error, message):
    adata, model = screened
    with pytest.raises(error, match=message):
        scfm.tl.predict_perturbation(adata, model, predict=predict, **KEYS)


def test_relatives_on_papalexi(scfm_data):
    """Measured knock-outs of the interferon-gamma pathway change expression alike; chance is a rank of 12 of 24."""
    adata = anndata.read_h5ad(scfm_data / "papalexi_thp1_20729x299.h5ad")
    measured = read_measured(
        adata,
        perturbation_key="target_argmax",
        control="non-targeting",
        separator="+",
        layer=None,
        gene_key=None,
        depth_key=None,
    )
    names = [target[0] for target in measured.targets]
    alike = np.corrcoef(measured.change_PG[:, ~np.isin(measured.genes, names)])
    pathway = {"STAT1", "JAK2", "IFNGR1", "IFNGR2"}
    for name in pathway:
        nearest = np.argsort(-alike[names.index(name)])[1:4]
        assert {names[place] for place in nearest} == pathway - {name}
