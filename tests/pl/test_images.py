"""Every figure beside a stored image of it: what no number tells, such as text that moved or a legend that went missing.

After a change that is meant, look at the new images and keep them: SCFM_UPDATE_BASELINE=1 pytest tests/pl/test_images.py
"""

import os
from pathlib import Path
from types import SimpleNamespace

import anndata
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.testing.compare import compare_images

import scfm

BASELINE = Path(__file__).with_name("baseline")
# Root mean square difference of pixels, 0 to 255. The version of matplotlib that drew the images gives 0; a bar of another
# color gives 55, labels that are gone 42, the label of an axis that is gone 28. So does another text renderer (16 to 37,
# since sizes of letters move the axes), which is why other versions are not compared.
TOLERANCE = 5.0
DRAWN_BY = "3.11"
GENES = ["CD74", "CD79A", "MS4A1", "HLA-DRA", "NKG7", "GNLY", "LYZ", "CST3"]


@pytest.fixture(autouse=True)
def _plain_style():
    """Matplotlib's defaults and the font that it brings, whatever this machine prefers."""
    with plt.rc_context(matplotlib.rcParamsDefault | {"font.family": "DejaVu Sans", "text.hinting": "none"}):
        yield


def cells():
    rng = np.random.default_rng(0)
    names = np.repeat(["B cell", "T cell", "Monocyte"], 40)
    center = np.repeat([[0, 0], [4, 1], [2, 4]], 40, axis=0)
    obs = pd.DataFrame({"truth": names, "predicted": np.roll(names, 6)}, index=[f"cell{n}" for n in range(120)])
    return anndata.AnnData(obs=obs, obsm={"X_umap": center + rng.normal(size=(120, 2)) / 2})


def effects():
    shift = np.geomspace(0.05, 0.002, len(GENES))
    return pd.DataFrame(
        {
            "n_cells": np.arange(20, 20 + len(GENES)),
            "shift_mean": shift,
            "shift_sem": shift / 8,
            "fdr": np.geomspace(1e-6, 0.9, len(GENES)),
            "estimate_mean": shift * np.linspace(0.8, 1.2, len(GENES)),
            "exact": True,
        },
        index=GENES,
    )


def edges():
    pairs = [(a, b) for place, a in enumerate(GENES) for b in GENES[place + 1 :]]
    z = np.linspace(-5, 7, len(pairs))
    return pd.DataFrame(
        {"source": [a for a, _ in pairs], "target": [b for _, b in pairs], "z": z, "fdr": np.exp(-np.abs(z))}
    )


def attention():
    ratio = np.exp2(np.linspace(-2, 2, len(GENES) ** 2).reshape(len(GENES), -1))
    np.fill_diagonal(ratio, np.nan)
    return pd.DataFrame(ratio, index=GENES, columns=GENES)


def history():
    stages = [("pretraining", 60, 7.0), ("fine-tuning", 40, 1.2)]
    losses = {name: start * np.exp(-np.arange(n) / 30) + 0.1 * np.sin(np.arange(n)) for name, n, start in stages}
    return SimpleNamespace(history={"stages": [{"name": n, "losses": list(v)} for n, v in losses.items()]})


def scores():
    return pd.DataFrame({"macro_f1": [0.83, 0.81, 0.34]}, index=["scfm", "logistic regression", "majority class"])


FIGURES = {
    "attention": lambda: scfm.pl.attention(attention(), show=False),
    "confusion": lambda: scfm.pl.confusion(cells(), truth="truth", predicted="predicted", show=False),
    "embedding": lambda: scfm.pl.embedding(cells(), color=["truth", "predicted"], show=False)[0],
    "gene_network": lambda: scfm.pl.gene_network(edges(), show=False),
    "perturbation": lambda: scfm.pl.perturbation(effects(), show=False),
    "report": lambda: scfm.pl.report(scores(), show=False),
    "screen": lambda: scfm.pl.screen(effects(), show=False),
    "training": lambda: scfm.pl.training(history(), show=False)[0],
    "volcano": lambda: scfm.pl.volcano(effects(), show=False),
}


def drawn(name, folder):
    path = folder / f"{name}.png"
    FIGURES[name]().figure.savefig(path, dpi=60, metadata={"Software": None})
    return path


same_renderer = pytest.mark.skipif(
    not matplotlib.__version__.startswith(f"{DRAWN_BY}."),
    reason=f"the images were drawn by matplotlib {DRAWN_BY}, the version in constraints.txt",
)


@same_renderer
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_looks_as_it_did(name, tmp_path):
    if os.environ.get("SCFM_UPDATE_BASELINE"):
        drawn(name, BASELINE)
    difference = compare_images(BASELINE / f"{name}.png", drawn(name, tmp_path), tol=TOLERANCE)
    assert difference is None, difference


def test_every_figure_has_an_image():
    assert set(FIGURES) == set(scfm.pl.__all__) == {path.stem for path in BASELINE.glob("*.png")}


@same_renderer
@pytest.mark.parametrize("change", ["another color", "a label gone"])
def test_the_tolerance_sees_what_matters(change, tmp_path):
    ax = FIGURES["report"]()
    if change == "another color":
        ax.patches[-1].set_color("#D55E00")
    else:
        ax.set_yticks([])
    ax.figure.savefig(tmp_path / "report.png", dpi=60)
    assert compare_images(BASELINE / "report.png", tmp_path / "report.png", tol=TOLERANCE) is not None
