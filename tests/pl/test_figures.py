"""Figures show the numbers they were given, follow scanpy's conventions, and keep their text apart."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from sklearn.metrics import confusion_matrix

import scfm
from scfm.pl._figure import COLORS, UNLABELED_COLOR


@pytest.fixture
def adata():
    cells = scfm.datasets.pbmc()
    del cells.uns["bulk_labels_colors"]
    cells.obs["other"] = cells.obs["bulk_labels"].astype(str).where(cells.obs["S_score"] < 0, "CD34+")
    return cells


@pytest.fixture
def effects():
    genes = [f"GENE{number}" for number in range(30)]
    shift = np.linspace(3e-5, 1e-6, 30)
    return pd.DataFrame({"n_cells": 9, "shift_mean": shift, "shift_sem": shift / 9}, index=genes)


def outline(text, renderer):
    """Corners of a text as it is drawn, turned about its anchor."""
    angle = text.get_rotation()
    if text.get_rotation_mode() != "anchor" or angle % 90 == 0:
        return text.get_window_extent(renderer).shrunk(0.9, 0.8).corners()[[0, 1, 3, 2]]
    text.set_rotation(0)
    box = text.get_window_extent(renderer).shrunk(0.9, 0.8)
    text.set_rotation(angle)
    anchor = text.get_transform().transform(text.get_unitless_position())
    return Affine2D().rotate_deg_around(*anchor, angle).transform(box.corners()[[0, 1, 3, 2]])


def texts_that_overlap(figure):
    """Pairs of visible texts whose outlines overlap, by the renderer: independent of how the figure was laid out."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    drawn = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text.get_visible()]
    outlines = [(text.get_text(), Path(outline(text, renderer), closed=False)) for text in drawn]
    return [(a, b) for i, (a, one) in enumerate(outlines) for b, two in outlines[i + 1 :] if one.intersects_path(two)]


def test_embedding_draws_every_cell_in_the_color_of_its_name(adata):
    panel, other = scfm.pl.embedding(adata, color=["bulk_labels", "other"], show=False)
    for ax, column in ((panel, "bulk_labels"), (other, "other")):
        points = ax.collections[0]
        order = np.lexsort(points.get_offsets().T)
        names = adata.obs[column].astype(str).to_numpy()[np.lexsort(adata.obsm["X_umap"].T)]
        colors = [to_hex(color) for color in points.get_facecolors()[order]]
        shown = list(adata.obs["bulk_labels"].cat.categories)  # the names of both panels
        assert colors == [COLORS[shown.index(name)].lower() for name in names]
    assert texts_that_overlap(panel.figure) == []


def test_embedding_has_one_legend_for_panels_with_the_same_names(adata):
    adata.obs["again"] = adata.obs["bulk_labels"]
    first, last = scfm.pl.embedding(adata, color=["bulk_labels", "again"], show=False)
    assert first.get_legend() is None
    assert len(last.get_legend().get_texts()) == 10


def test_embedding_shows_unlabeled_cells_in_gray(adata):
    adata.obs["other"] = adata.obs["other"].mask(adata.obs["other"] == "CD34+")
    (ax,) = scfm.pl.embedding(adata, color="other", show=False)
    colors = [to_hex(color) for color in ax.collections[0].get_facecolors()]
    assert colors.count(UNLABELED_COLOR) == adata.obs["other"].isna().sum() > 0
    assert ax.get_legend().get_texts()[-1].get_text() == "unlabeled"


def test_embedding_takes_the_colors_of_uns_and_of_the_palette(adata):
    categories = adata.obs["bulk_labels"].cat.categories
    adata.uns["bulk_labels_colors"] = [f"#{number:02x}0000" for number in range(len(categories))]

    def shown(**options):
        (ax,) = scfm.pl.embedding(adata, color="bulk_labels", show=False, **options)
        handles = ax.get_legend().legend_handles
        return [to_hex(handle.get_facecolor()[0]) for handle in handles]

    assert shown() == list(adata.uns["bulk_labels_colors"])
    given = [f"#00{number:02x}00" for number in range(len(categories))]
    assert shown(palette=given) == given
    assert shown(palette=dict(zip(categories, given))) == given
    with pytest.raises(ValueError, match="no color for"):
        shown(palette=given[:3])


def test_names_that_panels_share_have_the_stored_color_whatever_the_order(adata):
    adata.uns["bulk_labels_colors"] = COLORS[5:15]
    for color in (["bulk_labels", "other"], ["other", "bulk_labels"]):
        panels = scfm.pl.embedding(adata, color=color, show=False)
        seen = [
            {
                text.get_text(): to_hex(handle.get_facecolor()[0])
                for text, handle in zip(legend.get_texts(), legend.legend_handles)
            }
            for legend in (panel.get_legend() for panel in panels)
            if legend is not None
        ]
        assert all(shown[name] == seen[-1][name] for shown in seen for name in set(shown) & set(seen[-1]))
        assert seen[-1]["CD34+"] == COLORS[5 + list(adata.obs["bulk_labels"].cat.categories).index("CD34+")].lower()


def test_embedding_starts_with_the_first_color_in_each_panel_without_shared_names(adata):
    adata.obs["side"] = np.where(adata.obs["S_score"] < 0, "left", "right")
    _, ax = scfm.pl.embedding(adata, color=["bulk_labels", "side"], show=False)
    colors = [to_hex(handle.get_facecolor()[0]) for handle in ax.get_legend().legend_handles]
    assert colors == [COLORS[0].lower(), COLORS[1].lower()]


def test_embedding_shows_unassigned_cells_in_gray_and_last(adata):
    adata.obs["label"] = np.where(adata.obs["S_score"] < 0, "unassigned", "zeta")
    (ax,) = scfm.pl.embedding(adata, color="label", show=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["zeta", "unassigned"]
    assert to_hex(ax.get_legend().legend_handles[1].get_facecolor()[0]) == UNLABELED_COLOR


def test_embedding_draws_genes_and_passes_options_on(adata):
    (ax,) = scfm.pl.embedding(adata, color="CD74", basis="umap", size=7, alpha=0.5, show=False)
    points = ax.collections[0]
    order = np.lexsort(points.get_offsets().T)
    expected = np.log1p(adata.obs_vector("CD74"))[np.lexsort(adata.obsm["X_umap"].T)]
    np.testing.assert_allclose(points.get_array()[order], expected)
    assert (points.get_sizes()[0], points.get_alpha()) == (7, 0.5)


def test_values_that_are_no_counts_are_drawn_as_they_are(adata):
    adata.layers["half"] = adata.X * 0.5
    (ax,) = scfm.pl.embedding(adata, color="CD74", layer="half", show=False)
    assert ax.collections[0].get_array().max() == adata.obs_vector("CD74", layer="half").max()


def test_embedding_puts_four_panels_in_a_row(adata):
    axes = scfm.pl.embedding(adata, color=["bulk_labels", "CD74", "CST3", "phase", "louvain"], show=False)
    assert len(axes) == 5 == len([each for each in axes[0].figure.axes if each.get_title()])
    assert axes[4].get_position().y1 < axes[0].get_position().y0


def test_perturbation_fills_significant_genes_and_shades_the_null(effects):
    effects["fdr"] = np.where(np.arange(30) < 2, 0.01, 0.5)
    ax = scfm.pl.perturbation(effects, n_genes=4, show=False)
    points = next(found for found in ax.collections if len(found.get_offsets()) == 4)
    filled = [to_hex(color) for color in points.get_facecolors()]
    assert filled == ["#ffffff", "#ffffff", COLORS[0].lower(), COLORS[0].lower()]  # the largest is last
    band = ax.patches[0].get_extents()
    low, high = np.quantile(effects["shift_mean"], [0.025, 0.975])
    (x0, _), (x1, _) = ax.transData.inverted().transform([(band.x0, 0), (band.x1, 0)])
    np.testing.assert_allclose([x0, x1], [low, high])


def test_numbers_get_a_color_bar(adata):
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


def test_colors_differ_for_color_blind_eyes():
    """Simulated deuteranopia and protanopia (Vienot et al. 1999): all colors stay apart, and apart from the unlabeled gray."""
    linear = (
        np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in [*COLORS, UNLABELED_COLOR]]) ** 2.2
    )
    deuteranopia = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    protanopia = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
    for simulated in (deuteranopia, protanopia):
        seen = np.clip(linear @ simulated.T, 0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distance[~np.eye(len(seen), dtype=bool)].min() > 0.1


@pytest.fixture(scope="module")
def fitted():
    cells = scfm.datasets.pbmc()[:60].copy()
    return scfm.fit(
        cells,
        labels_key="bulk_labels",
        config=scfm.FitConfig(n_steps=3),
        pretrain_config=scfm.FitConfig(n_steps=3),
        progress=False,
    )


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


def test_training_has_one_panel_per_stage_and_a_centered_average(fitted):
    panels = scfm.pl.training(fitted, smoothing=3, show=False)
    assert [panel.get_title() for panel in panels] == ["pretraining", "fine-tuning"]
    for panel, stage in zip(panels, fitted.history["stages"]):
        steps, average = panel.lines
        np.testing.assert_allclose(steps.get_ydata(), stage["losses"])
        losses = np.array(stage["losses"])
        around = [losses[max(step - 1, 0) : step + 2].mean() for step in range(len(losses))]
        np.testing.assert_allclose(average.get_ydata(), around)
    with pytest.raises(ValueError, match="2 stages"):
        scfm.pl.training(fitted, ax=panels[0], show=False)


def test_volcano_colors_and_names_what_is_sure(effects):
    effects["fdr"] = [1e-4, 0.05, 0.051, *[0.9] * 26, np.nan]
    ax = scfm.pl.volcano(effects, max_fdr=0.05, show=False)
    gray, colored = ax.collections
    assert len(colored.get_offsets()) == 2  # 0.05 itself counts
    assert len(gray.get_offsets()) == 27  # the untested one is not drawn
    assert [text.get_text() for text in ax.texts] == ["FDR = 0.05", "GENE0", "GENE1"]
    np.testing.assert_allclose(colored.get_offsets()[0], [effects["shift_mean"].iloc[0], 4])
    with pytest.raises(ValueError, match="false discovery rate"):
        scfm.pl.volcano(effects.drop(columns="fdr"), show=False)


def test_names_of_points_stay_inside_and_apart():
    """Names of a point at the right edge and of five points in one position are inside the axes and do not overlap."""
    crowded = pd.DataFrame(
        {"shift_mean": [0.05, *[0.02] * 5, 0.01], "fdr": [1e-9, *[1e-4] * 5, 0.9]}, index=["EDGE", *"ABCDE", "NOT"]
    )
    ax = scfm.pl.volcano(crowded, show=False)
    assert [text.get_text() for text in ax.texts[1:]] == ["EDGE", "A", "B", "C", "D", "E"]
    assert texts_that_overlap(ax.figure) == []
    frame = ax.get_window_extent()
    for text in ax.texts[1:]:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1


def test_names_keep_clear_of_points():
    """A point to the upper right of another one leaves the other sides free; no name covers a point."""
    close = pd.DataFrame({"shift_mean": [0.02, 0.0202, 0.01, 0.03], "fdr": [1e-4, 9e-5, 0.9, 0.9]}, index=list("ABCD"))
    ax = scfm.pl.volcano(close, show=False)
    ax.figure.draw_without_rendering()
    points = ax.transData.transform(np.concatenate([found.get_offsets() for found in ax.collections]))
    for text in ax.texts[1:]:
        box = text.get_window_extent()
        assert not any(box.contains(x, y) for x, y in points)


def test_effects_on_a_label_put_the_lowest_on_top(effects):
    columns = {"shift_mean": "label_shift_mean", "shift_sem": "label_shift_sem"}
    lowest = effects.rename(columns=columns).assign(label_shift_mean=np.linspace(-0.2, 0.1, 30), fdr=0.01)
    ax = scfm.pl.perturbation(lowest, n_genes=3, show=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["GENE2", "GENE1", "GENE0"]
    assert "log-odds" in ax.get_xlabel()
    volcano = scfm.pl.volcano(lowest.assign(fdr=np.linspace(0.001, 0.9, 30)), n_names=1, show=False)
    assert [text.get_text() for text in volcano.texts] == ["FDR = 0.05", "GENE0"]
    lowest = lowest.assign(estimate_mean=lowest["label_shift_mean"], exact=True)
    screen = scfm.pl.screen(lowest, n_names=1, show=False)
    assert [text.get_text() for text in screen.texts] == ["GENE0"]


def test_the_band_is_of_the_null_genes_that_the_table_names(effects):
    effects.attrs["null_means"] = np.linspace(-1, 1, 21).tolist()
    ax = scfm.pl.perturbation(effects[:2], show=False)
    band = ax.patches[0].get_extents()
    (x0, _), (x1, _) = ax.transData.inverted().transform([(band.x0, 0), (band.x1, 0)])
    np.testing.assert_allclose([x0, x1], [-0.95, 0.95])
    assert "middle 95 % of 21 null genes" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_pairs_of_genes_are_named_by_both():
    pairs = pd.DataFrame({"gene": ["A", "A"], "affected": ["B", "C"], "n_cells": 9, "shift_mean": [2.0, 1.0]})
    ax = scfm.pl.perturbation(pairs.assign(shift_sem=0.1), show=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["A on C", "A on B"]


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
    points = ax.collections[-1].get_offsets()
    np.testing.assert_allclose(points[:, 0], toward["goal_shift_mean"].max())


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
    with pytest.raises(ValueError, match="occur together"):
        scfm.pl.attention(table * np.nan, show=False)
