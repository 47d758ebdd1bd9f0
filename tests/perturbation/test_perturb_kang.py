"""Interferon: known response genes against genes that as many control cells express, on real monocytes (Kang 2018)."""

import anndata
import numpy as np
import pytest
from scipy import stats

import scfm

RESPONSE = [
    "ISG15", "IFI6", "IFIT1", "IFIT2", "IFIT3", "MX1", "OAS1", "ISG20", "LY6E", "IFITM3", "CXCL10", "IFI44L", "IRF7",
    "TNFSF10", "RSAD2", "APOBEC3A", "IFI35", "STAT1",
]  # fmt: skip


@pytest.fixture(scope="module")
def monocytes(scfm_data):
    adata = anndata.read_h5ad(scfm_data / "kang_ifnb_2000.h5ad")
    adata = adata[(adata.obs["cell_type"] == "CD14+ Monocytes") & (np.asarray((adata.X > 0).sum(1)).ravel() >= 200)]
    common = np.argsort(-np.asarray(adata.X.mean(0)).ravel(), kind="stable")[:700]
    return adata[:, adata.var_names.isin([*adata.var_names[common], *RESPONSE])].copy()


@pytest.fixture(scope="module")
def model(monocytes):
    config = scfm.FitConfig(n_steps=60, tokens_per_step=3000)
    return scfm.fit(monocytes.copy(), config=config, progress=False)


def matched_genes(adata, genes):
    """Three genes for each, drawn from the six that most nearly as many control cells express."""
    detected = np.asarray((adata[adata.obs["condition"] == "ctrl"].X > 0).mean(0)).ravel()
    rate = dict(zip(adata.var_names, detected))
    rng, chosen = np.random.default_rng(0), []
    for gene in genes:
        left = [other for other in adata.var_names if other not in genes and other not in chosen]
        nearest = sorted(left, key=lambda other: abs(rate[other] - rate[gene]))[:6]
        chosen += rng.choice(nearest, 3, replace=False).tolist()
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "toward"), [("overexpress", "greater"), ("delete", "less")])
def test_response_genes_move_control_cells_more_than_matched_genes(monocytes, model, kind, toward):
    """Toward the stimulated state when overexpressed, away from it when deleted; one-sided rank-sum over genes."""
    genes = [gene for gene in RESPONSE if gene in monocytes.var_names]
    matched = matched_genes(monocytes, genes)
    control = np.flatnonzero(monocytes.obs["condition"] == "ctrl")[:40]
    stimulated = np.flatnonzero(monocytes.obs["condition"] == "stim")[:100]
    table = scfm.tl.perturb(
        monocytes[np.concatenate([control, stimulated])], model, genes=[*genes, *matched], kind=kind,
        groupby="condition", start="ctrl", goal="stim", n_bootstrap=0, progress=False,
    )["goal_shift_mean"].dropna()  # fmt: skip  # genes that no control cell expresses cannot be deleted
    response, null = table[table.index.isin(genes)], table[table.index.isin(matched)]
    result = stats.mannwhitneyu(response, null, alternative=toward)
    assert result.pvalue < 0.01, f"{kind}: U = {result.statistic}, p = {result.pvalue:.2g}"
