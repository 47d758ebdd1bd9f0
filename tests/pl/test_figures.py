"""Figures show the numbers they were given, follow scanpy's conventions, and keep their text apart."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from sklearn.metrics import confusion_matrix

import scfm
from scfm.pl._figure import COLORS, UNLABELLED


@pytest.fixture
def adata():
    cells = scfm.datasets.pbmc()
    cells.obs["other"] = cells.obs["bulk_labels"].astype(str).where(cells.obs["S_score"] < 0, "CD34+")
    return cells


@pytest.fixture
def effects():
    genes = [f"GENE{number}" for number in range(30)]
    shift = np.linspace(3e-5, 1e-6, 30)
    return pd.DataFrame({"n_cells": 9, "shift_mean": shift, "shift_sem": shift / 9}, index=genes)


def texts_that_overlap(figure):
    """Pairs of visible texts whose boxes overlap, by the renderer: independent of how the figure was laid out."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    drawn = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(renderer).shrunk(0.9, 0.8)) for text in drawn]
    return [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[i + 1 :] if box.overlaps(other)]


def test_embedding_draws_every_cell_in_the_colour_of_its_name(adata):
    panel, other = scfm.pl.embedding(adata, color=["bulk_labels", "other"], show=False)
    for ax, column in ((panel, "bulk_labels"), (other, "other")):
        points = ax.collections[0]
        order = np.lexsort(points.get_offsets().T)
        names = adata.obs[column].astype(str).to_numpy()[np.lexsort(adata.obsm["X_umap"].T)]
        colors = [to_hex(color) for color in points.get_facecolors()[order]]
        shown = sorted(set(adata.obs["bulk_labels"].astype(str)))  # the names of both panels
        assert colors == [COLORS[shown.index(name)].lower() for name in names]
    assert texts_that_overlap(panel.figure) == []


def test_embedding_has_one_legend_for_panels_with_the_same_names(adata):
    adata.obs["again"] = adata.obs["bulk_labels"]
    first, last = scfm.pl.embedding(adata, color=["bulk_labels", "again"], show=False)
    assert first.get_legend() is None
    assert len(last.get_legend().get_texts()) == 10


def test_embedding_shows_unlabelled_cells_in_grey(adata):
    adata.obs["other"] = adata.obs["other"].mask(adata.obs["other"] == "CD34+")
    (ax,) = scfm.pl.embedding(adata, color="other", show=False)
    colors = [to_hex(color) for color in ax.collections[0].get_facecolors()]
    assert colors.count(UNLABELLED.lower()) == adata.obs["other"].isna().sum() > 0
    assert ax.get_legend().get_texts()[-1].get_text() == "unlabelled"


def test_numbers_get_a_colour_bar(adata):
    (ax,) = scfm.pl.embedding(adata, color="S_score", show=False)
    assert ax.get_legend() is None
    assert len(ax.figure.axes) == 2


def test_confusion_counts_as_scikit_learn(adata):
    ax = scfm.pl.confusion(adata, truth="bulk_labels", predicted="other", show=False)
    truth, predicted = adata.obs["bulk_labels"].astype(str), adata.obs["other"].astype(str)
    expected = confusion_matrix(truth, predicted, labels=sorted(truth.unique()))
    shown = np.zeros_like(expected)
    for text in ax.texts:
        column, row = map(int, text.get_position())
        shown[row, column] = int(text.get_text())
    np.testing.assert_array_equal(shown, expected)
    np.testing.assert_allclose(ax.images[0].get_array(), expected / expected.sum(1, keepdims=True))
    assert texts_that_overlap(ax.figure) == []


def test_perturbation_ranks_genes_and_keeps_the_power_of_ten_clear_of_the_label(effects):
    ax = scfm.pl.perturbation(effects.sample(frac=1, random_state=0), n_genes=5, show=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["GENE4", "GENE3", "GENE2", "GENE1", "GENE0"]
    assert "10^{-5}" in ax.get_xlabel()
    assert texts_that_overlap(ax.figure) == []


def test_perturbation_leaves_out_genes_of_few_cells(effects):
    effects.loc["GENE0", "n_cells"] = 2
    ax = scfm.pl.perturbation(effects, n_genes=2, min_cells=3, show=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["GENE2", "GENE1"]
    with pytest.raises(ValueError, match="lower `min_cells`"):
        scfm.pl.perturbation(effects, min_cells=10, show=False)


def test_ax_save_and_show(adata, effects, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    _, ax = plt.subplots()
    assert scfm.pl.perturbation(effects, ax=ax, save=tmp_path / "figure.png") is ax
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert shown == []
    scfm.pl.perturbation(effects)
    assert shown == [True]
    with pytest.raises(ValueError, match="`ax` takes one panel"):
        scfm.pl.embedding(adata, color=["bulk_labels", "other"], ax=ax, show=False)


def test_missing_columns_name_those_that_exist(adata):
    with pytest.raises(KeyError, match="bulk_labels"):
        scfm.pl.embedding(adata, color="celltype", show=False)
    with pytest.raises(KeyError, match="neighbors"):
        scfm.pl.embedding(adata, color="bulk_labels", basis="X_none", show=False)
    with pytest.raises(KeyError, match=r"scfm\.tl\.annotate"):
        scfm.pl.confusion(adata, truth="bulk_labels", show=False)


def test_another_table_is_told_which_was_wanted(adata):
    for draw in (scfm.pl.perturbation, scfm.pl.volcano, scfm.pl.screen):
        with pytest.raises(KeyError, match=r"no column 'shift_mean' \(bulk_labels"):
            draw(adata.obs, show=False)


def test_colours_differ_for_colour_blind_eyes():
    """Simulated deuteranopia and protanopia (Vienot et al. 1999): all colours stay apart, and apart from the unlabelled grey."""
    linear = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in [*COLORS, UNLABELLED]]) ** 2.2
    deuteranopia = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    protanopia = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
    for simulated in (deuteranopia, protanopia):
        seen = np.clip(linear @ simulated.T, 0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distance[~np.eye(len(seen), dtype=bool)].min() > 0.1


@pytest.fixture(scope="module")
def fitted():
    cells = scfm.datasets.pbmc()[:60].copy()
    return scfm.fit(cells, labels_key="bulk_labels", config=scfm.FitConfig(n_steps=3), progress=False)


def test_report_draws_each_method_and_marks_the_model(fitted):
    ax = scfm.pl.report(fitted, show=False)
    table = fitted.report()["macro_f1"].sort_values(kind="stable")
    assert [label.get_text() for label in ax.get_yticklabels()] == list(table.index)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], table)
    marked = [name for name, bar in zip(table.index, ax.patches) if to_hex(bar.get_facecolor()) == COLORS[0].lower()]
    assert marked == [name for name in table.index if name.startswith("scfm")] != []
    assert texts_that_overlap(ax.figure) == []
    with pytest.raises(KeyError, match="macro_f1"):
        scfm.pl.report(fitted, score="f1", show=False)


def test_training_draws_the_losses_of_every_stage(fitted):
    ax = scfm.pl.training(fitted, smoothing=1, show=False)
    drawn = {line.get_label(): line for line in ax.lines}
    start = 0
    for stage in fitted.history["stages"]:
        np.testing.assert_allclose(drawn[stage["name"]].get_ydata(), stage["losses"])
        np.testing.assert_array_equal(drawn[stage["name"]].get_xdata(), start + 1 + np.arange(len(stage["losses"])))
        start += len(stage["losses"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["pretraining", "fine-tuning"]


def test_volcano_colours_and_names_what_is_sure(effects):
    effects["fdr"] = [1e-4, 0.05, 0.051, *[0.9] * 26, np.nan]
    ax = scfm.pl.volcano(effects, max_fdr=0.05, show=False)
    grey, coloured = ax.collections
    assert len(coloured.get_offsets()) == 2  # 0.05 itself counts
    assert len(grey.get_offsets()) == 27  # the untested one is not drawn
    assert [text.get_text() for text in ax.texts] == ["GENE0", "GENE1"]
    np.testing.assert_allclose(coloured.get_offsets()[0], [effects["shift_mean"].iloc[0], 4])
    with pytest.raises(ValueError, match="false discovery rate"):
        scfm.pl.volcano(effects.drop(columns="fdr"), show=False)


def test_names_of_points_stay_inside_and_apart():
    """Two points in one place get one name, the first; one at the right edge has its name to its left."""
    crowded = pd.DataFrame(
        {"shift_mean": [0.05, 0.02, 0.02], "fdr": [1e-9, 1e-4, 1e-4]}, index=["EDGE", "ONE", "OTHER"]
    )
    ax = scfm.pl.volcano(crowded, show=False)
    assert [text.get_text() for text in ax.texts] == ["EDGE", "ONE"]
    assert texts_that_overlap(ax.figure) == []
    box, frame = ax.texts[0].get_window_extent(), ax.get_window_extent()
    assert frame.x0 <= box.x0 < box.x1 <= frame.x1


def test_screen_draws_estimate_against_exact_for_verified_genes_only(effects):
    effects["estimate_mean"] = effects["shift_mean"] * 1.1
    effects["exact"] = np.arange(30) < 7
    effects.attrs["recall_estimate"] = 0.96
    ax = scfm.pl.screen(effects, n_names=2, show=False)
    np.testing.assert_allclose(
        ax.collections[0].get_offsets(), effects.loc[effects["exact"], ["estimate_mean", "shift_mean"]]
    )
    assert "96%" in ax.get_title()
    assert texts_that_overlap(ax.figure) == []
    with pytest.raises(ValueError, match="n_verify"):
        scfm.pl.screen(effects.assign(exact=False), show=False)


def test_perturbation_with_a_goal_draws_shifts_toward_it(effects):
    toward = effects.rename(columns=lambda name: name.replace("shift", "goal_shift"))
    toward["shift_mean"] = 1.0
    ax = scfm.pl.perturbation(toward, n_genes=1, show=False)
    assert "goal" in ax.get_xlabel()
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_xdata(), float), toward["goal_shift_mean"].max())


@pytest.fixture
def edges():
    rows = [("A", "B", 6.0, 0.001), ("B", "A", 5.0, 0.01), ("B", "C", -4.0, 0.04), ("C", "A", 1.0, 0.4)]
    return pd.DataFrame(rows, columns=["source", "target", "z", "fdr"])


def test_gene_network_draws_sure_edges_with_their_sign_and_direction(edges):
    ax = scfm.pl.gene_network(edges, max_fdr=0.05, show=False)
    blue, orange = ax.patches  # A and B look at each other: one line with two heads
    assert to_hex(blue.get_edgecolor()) == COLORS[0].lower()
    assert to_hex(orange.get_edgecolor()) == COLORS[5].lower()
    heads = [type(line.get_arrowstyle()).__name__ for line in (blue, orange)]
    assert heads == ["CurveFilledAB", "CurveFilledB"]  # at both ends, and at the target
    assert blue.get_linewidth() > orange.get_linewidth()
    place = {text.get_text(): np.array(text.get_position()) for text in ax.texts}
    assert set(place) == {"A", "B", "C"}
    start = orange.get_path().vertices[0]
    assert min(place, key=lambda gene: np.linalg.norm(place[gene] - start)) == "B"
    assert texts_that_overlap(ax.figure) == []


def test_gene_network_takes_the_strongest_and_names_the_rule(edges):
    ax = scfm.pl.gene_network(edges, n_edges=1, show=False)
    assert len(ax.patches) == 1
    assert ax.get_title().startswith("1 of 4 edges")
    with pytest.raises(ValueError, match=r"smallest is 0\.001"):
        scfm.pl.gene_network(edges, max_fdr=1e-6, show=False)


def test_attention_is_symmetric_about_the_average_token():
    genes = ["A", "B", "C"]
    table = pd.DataFrame([[np.nan, 8.0, 1.0], [0.5, np.nan, np.nan], [1.0, 1.0, np.nan]], index=genes, columns=genes)
    ax = scfm.pl.attention(table, show=False)
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown.filled(np.nan), np.log2(table))
    assert ax.images[0].get_clim() == (-3, 3)
    assert texts_that_overlap(ax.figure) == []
    with pytest.raises(ValueError, match="seen together"):
        scfm.pl.attention(table * np.nan, show=False)
