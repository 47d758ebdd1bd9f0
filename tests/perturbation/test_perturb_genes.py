"""`scfm.tl.perturb(effect_on="genes")`. Oracles: a plain loop over cells, scipy."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import scfm
from scfm.encoding import EncodingConfig, make_encoding
from scfm.families import merged
from scfm.families.scfm import ARCHITECTURES
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.perturbation.gene_shifts import OTHER_GENES, GeneShiftRunner


@pytest.fixture(scope="module")
def cells():
    adata = scfm.datasets.pbmc()[:, :60].copy()
    return adata[np.asarray((adata.X > 0).sum(1)).ravel() >= 5][:10].copy()


@pytest.fixture(scope="module", params=["rank", "bin"])
def model(request, cells):
    """A random network: the shifts must be right whatever the weights are. Its embedding is not of the last layer."""
    fitted = make_encoding(EncodingConfig(kind=request.param, add_cls=True), adata=cells)
    torch.manual_seed(0)
    heads, pooling = {"genes": False, "values": "none"}, {"how": "mean", "hidden_layer": -2}
    sizes = {"n_tokens": len(fitted.vocabulary), "context_length": 1024, "d_model": 32, "n_heads": 2, "n_layers": 2}
    parts = {**sizes, "d_ff": 48, "heads": heads, "pooling": pooling}
    config = scfm.ModelConfig.from_dict(merged(ARCHITECTURES[request.param], parts))
    network = CellTransformer.for_vocabulary(config, fitted.vocabulary)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return Model(network, fitted)


def commonest(cells, n_genes):
    return cells.var_names[np.argsort(-np.asarray((cells.X > 0).sum(0)).ravel(), kind="stable")[:n_genes]].tolist()


def states(model, cell):
    """{gene: its state}, of one encoded cell."""
    with torch.inference_mode():
        hidden_TD = model.network(cell, hidden_layer=1).double().numpy()
    names = model.encoding.vocabulary.tokens
    return {names[token]: state for token, state in zip(cell.gene_ids_T.tolist(), hidden_TD)}


def without(cell, tokens):
    kept = ~torch.isin(cell.gene_ids_T, torch.tensor(tokens, dtype=torch.int32))
    values = None if cell.values_T is None else cell.values_T[kept]
    bounds = torch.tensor([0, int(kept.sum())], dtype=torch.int32)
    return scfm.CellBatch(gene_ids_T=cell.gene_ids_T[kept], cu_seqlens=bounds, values_T=values)


def test_shifts_of_genes_agree_with_a_plain_loop(cells, model):
    first, second = commonest(cells, 2)
    groups = {first: [first], f"{first}+{second}": [first, second]}
    table = scfm.tl.perturb(cells, model, genes=list(groups.values()), effect_on="genes", min_cells=1, progress=False)
    encoded, vocabulary = scfm.pp.encode(cells, model), model.encoding.vocabulary
    expected = {}
    for number in range(cells.n_obs):
        cell = encoded.select([number])
        for name, genes in groups.items():
            tokens = vocabulary.token_ids(genes).tolist()
            if not set(tokens) <= set(cell.gene_ids_T.tolist()):
                continue
            before, after = states(model, cell), states(model, without(cell, tokens))
            for gene in after.keys() - {vocabulary.tokens[vocabulary.cls_id]}:
                a, b = before[gene], after[gene]
                shift = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                expected.setdefault((name, gene), []).append(shift)
    found = table.set_index(["gene", "affected"])
    assert set(found.index) == set(expected)
    for key, shifts in expected.items():
        assert found.loc[key, "n_cells"] == len(shifts)
        assert found.loc[key, "shift_mean"] == pytest.approx(np.mean(shifts), rel=2e-3, abs=1e-8)
    assert table["shift_mean"].is_monotonic_decreasing
    assert set(table["null"]) == {OTHER_GENES}


def test_a_gene_is_tested_against_the_others_or_against_itself_under_null_genes(cells, model):
    names = commonest(cells, 3)
    options = {"effect_on": "genes", "n_bootstrap": 0, "progress": False}
    runs = {name: scfm.tl.perturb(cells, model, genes=[name], **options) for name in names}
    assert (runs[names[0]]["p_value"] <= 1).all()
    against_null = scfm.tl.perturb(cells, model, genes=names[:1], null_genes=names[1:], **options)
    assert set(against_null["gene"]) == {names[0]}
    pd.testing.assert_frame_equal(
        against_null[["affected", "n_cells", "shift_mean"]], runs[names[0]][["affected", "n_cells", "shift_mean"]]
    )
    # Groups of one cell each leave nothing to a test but the place among the null values.
    alone = {n: scfm.tl.perturb(cells[:1], model, genes=[n], **options).set_index("affected") for n in names}
    one = scfm.tl.perturb(cells[:1], model, genes=names[:1], null_genes=names[1:], **options).set_index("affected")
    gene = next(g for g in one.index if g not in names)
    null = [alone[n].loc[gene, "shift_mean"] for n in names[1:] if gene in alone[n].index]
    expected = stats.mannwhitneyu([one.loc[gene, "shift_mean"]], null, method="asymptotic").pvalue
    assert one.loc[gene, "p_value"] == pytest.approx(expected)
    assert one.loc[gene, "null_mean"] == pytest.approx(np.mean(null))


def test_overexpression_moves_all_other_genes(cells, model):
    n_cells = np.asarray((cells.X > 0).sum(0)).ravel()
    gene = cells.var_names[np.argmin(np.where(n_cells > 0, n_cells, cells.n_obs + 1))]
    table = scfm.tl.perturb(cells, model, genes=[gene], kind="overexpress", effect_on="genes", progress=False)
    assert set(table["affected"]) == set(cells.var_names[n_cells > 0]) - {gene}
    counts = pd.Series(n_cells, cells.var_names)
    assert (table["n_cells"].to_numpy() == counts[table["affected"]].to_numpy()).all()


def test_it_continues_from_its_checkpoint_and_shows_the_time_left(cells, model, tmp_path, monkeypatch, capsys):
    options = {"genes": commonest(cells, 3), "effect_on": "genes", "n_bootstrap": 0}
    whole = scfm.tl.perturb(cells, model, progress=False, **options)
    monkeypatch.setattr(GeneShiftRunner, "variants_per_block", 4)
    started, original = [], GeneShiftRunner.run_block

    def stops_at_the_third(self, start, stop):
        started.append(start)
        if len(started) == 3:
            raise KeyboardInterrupt
        return original(self, start, stop)

    monkeypatch.setattr(GeneShiftRunner, "run_block", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        scfm.tl.perturb(cells, model, checkpoint=tmp_path / "run.npz", progress=False, **options)
    continued = scfm.tl.perturb(cells, model, checkpoint=tmp_path / "run.npz", **options)
    assert started.count(0) == 1
    key = ["gene", "affected"]
    pd.testing.assert_frame_equal(
        continued.sort_values(key, ignore_index=True), whole.sort_values(key, ignore_index=True), rtol=1e-9
    )
    shown = capsys.readouterr().err
    assert "deleting" in shown
    assert "<" in shown  # tqdm: time taken < time left


def test_the_table_survives_h5ad(cells, model, tmp_path):
    import anndata

    adata = cells.copy()
    table = scfm.tl.perturb(adata, model, genes=commonest(cells, 1), effect_on="genes", key_added="k", progress=False)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad").uns["k"]
    pd.testing.assert_frame_equal(back.reset_index(drop=True), table, check_dtype=False, check_index_type=False)
