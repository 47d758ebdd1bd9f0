"""Read-depth-aware regression against the counts it came from."""

import numpy as np
import pytest
import torch

from scfm.data import CellBatch
from scfm.families import merged, scfoundation
from scfm.models import CellTransformer, ModelConfig
from scfm.objectives import ReadDepth, total

N_GENES, N_CELLS = 200, 6
TARGET, SOURCE = N_GENES, N_GENES + 1


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(3.0, (N_CELLS, N_GENES)) * np.random.default_rng(1).integers(
        0, 2, (N_CELLS, N_GENES)
    )


@pytest.fixture
def cells(counts):
    totals = counts.sum(1, keepdims=True)
    depth = np.log10(totals)
    values = np.concatenate([np.log1p(counts / totals * 1e4), depth, depth], 1).astype(np.float32)
    return CellBatch(
        gene_ids_T=torch.arange(N_GENES + 2, dtype=torch.int32).repeat(N_CELLS),
        cu_seqlens=torch.arange(N_CELLS + 1, dtype=torch.int32) * (N_GENES + 2),
        values_T=torch.from_numpy(values.ravel()),
    )


def objective(**changes):
    is_gene_V = torch.ones(N_GENES + 3, dtype=torch.bool)
    is_gene_V[N_GENES:] = False
    return ReadDepth(is_gene_V=is_gene_V, target_id=TARGET, source_id=SOURCE, **changes)


def test_thinned_cells_hold_whole_counts_and_both_depths(cells, counts):
    thin = objective(downsample_probability=1.0, mask_fraction=0.0, mask_fraction_zero=0.0)
    inputs, _ = thin.corrupt(cells, torch.Generator().manual_seed(0))
    values_BG = inputs.values_T.view(N_CELLS, -1).double().numpy()
    total_B = 10 ** values_BG[:, SOURCE]
    kept_BG = np.expm1(values_BG[:, :N_GENES]) * total_B[:, None] / 1e4
    np.testing.assert_allclose(kept_BG, kept_BG.round(), atol=1e-2)
    assert (kept_BG.round() <= counts).all()
    np.testing.assert_allclose(kept_BG.sum(1), total_B, rtol=1e-4)
    np.testing.assert_allclose(10 ** values_BG[:, TARGET], counts.sum(1), rtol=1e-4)
    rate_B = total_B / counts.sum(1)
    assert (rate_B < 0.95).any()
    # Thinning is binomial: the share kept is the same for small and large counts.
    large = counts >= 4
    small = (counts > 0) & ~large
    for cell in range(N_CELLS):
        shares = [kept_BG[cell][part[cell]].sum() / counts[cell][part[cell]].sum() for part in (small, large)]
        assert abs(shares[0] - shares[1]) < 0.25


def test_without_thinning_only_masked_genes_change(cells):
    inputs, targets = objective(downsample_probability=0.0).corrupt(cells, torch.Generator().manual_seed(0))
    token_N = targets["token_N"]
    changed = (inputs.values_T != cells.values_T).nonzero().squeeze(1)
    assert set(changed.tolist()) <= set(token_N.tolist())
    assert (cells.gene_ids_T[token_N] < N_GENES).all()
    assert torch.equal(targets["values_N"], cells.values_T[token_N])
    hidden = (inputs.values_T[token_N] == -1).float().mean()
    assert 0.7 < float(hidden) < 0.9


def test_without_masks_thinned_cells_are_whole_and_every_gene_is_asked_for(cells):
    whole = objective(downsample_probability=1.0, masked=False)
    inputs, targets = whole.corrupt(cells, torch.Generator().manual_seed(0))
    assert (inputs.values_T >= 0).all()  # the mask value is negative
    is_gene_T = cells.gene_ids_T < N_GENES
    torch.testing.assert_close(targets["token_N"], is_gene_T.nonzero().squeeze(1))
    torch.testing.assert_close(targets["values_N"], cells.values_T[is_gene_T])
    assert (inputs.values_T[is_gene_T] != cells.values_T[is_gene_T]).any()


def test_shares_of_targets_are_those_of_expressed_and_silent_genes(cells):
    counted = {True: [], False: []}
    for seed in range(100):
        _, targets = objective(downsample_probability=0.0).corrupt(cells, torch.Generator().manual_seed(seed))
        chosen = torch.zeros(cells.n_tokens).index_fill(0, targets["token_N"], 1.0)
        is_gene = cells.gene_ids_T < N_GENES
        for expressed in counted:
            counted[expressed].append(chosen[is_gene & ((cells.values_T > 0) == expressed)].mean())
    assert float(torch.stack(counted[True]).mean()) == pytest.approx(0.3, abs=0.01)
    assert float(torch.stack(counted[False]).mean()) == pytest.approx(0.03, abs=0.005)


def test_the_loss_is_the_squared_error_of_the_original_values(cells):
    torch.manual_seed(0)
    sizes = {"n_tokens": N_GENES + 3, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32}
    attention = {"kind": "linear", "qkv_bias": False, "head_width": 4}
    decoder = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 32, "attention": attention}
    parts = {"decoder": decoder, "embedding": {"n_value_bins": 5}}
    network = CellTransformer(ModelConfig.from_dict(merged(scfoundation.ARCHITECTURE, sizes, parts))).eval()
    inputs, targets = objective().corrupt(cells, torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted_T = network.values(network.value_states(inputs))
        expected = ((predicted_T[targets["token_N"]] - targets["values_N"]) ** 2).mean()
        torch.testing.assert_close(total(objective().loss(network, inputs, targets)), expected)
