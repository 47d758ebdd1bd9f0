"""`scfm.tl.perturb`. Oracles: a plain loop over cells and genes, lists of ranks by hand, scipy."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import scfm
from scfm.encoding import EncodingConfig, make_encoding
from scfm.errors import EmptyCellError, LabelsError, VocabularyMismatchError
from scfm.families import merged
from scfm.families.scfm import ARCHITECTURES
from scfm.models.model import Model
from scfm.models.network import CellTransformer
from scfm.perturbation.deletions import embed_deletions, shares_first_block
from scfm.perturbation.edits import Editor, TokenCell
from scfm.perturbation.null import with_matched_null
from scfm.perturbation.runner import VariantRunner, embed_variants
from scfm.perturbation.shifts import KEPT, ShiftRecord, cosine_distance, goal_shift
from scfm.perturbation.statistics import Null, average_ranks, bootstrap_interval, false_discovery_rate, rank_sum
from scfm.perturbation.variants import Perturbations, cell_of


def toy_model(adata, kind, **encoding):
    """A random network of two layers: perturbation must be right whatever the weights are."""
    fitted = make_encoding(EncodingConfig(kind=kind, **encoding), adata=adata)
    torch.manual_seed(0)
    heads, pooling = {"genes": False, "values": "none"}, {"how": "mean"}
    sizes = {"n_tokens": len(fitted.vocabulary), "context_length": 1024, "d_model": 32, "n_heads": 2, "n_layers": 2}
    parts = {**sizes, "d_ff": 48, "heads": heads, "pooling": pooling}
    config = scfm.ModelConfig.from_dict(merged(ARCHITECTURES[kind], parts))
    network = CellTransformer.for_vocabulary(config, fitted.vocabulary)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return Model(network, fitted)


@pytest.fixture(scope="module")
def cells():
    adata = scfm.datasets.pbmc()
    adata = adata[:, :60].copy()
    return adata[np.asarray((adata.X > 0).sum(1)).ravel() >= 5][:12].copy()


@pytest.fixture(scope="module")
def rank_model(cells):
    return toy_model(cells, "rank")


def embed_tokens(model, ids, values=None):
    """One cell, by hand, straight through the network."""
    batch = scfm.CellBatch(
        gene_ids_T=torch.tensor(ids, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        values_T=None if values is None else torch.tensor(values, dtype=torch.float32),
    )
    with torch.inference_mode():
        return model.network.embed_cells(batch)[0].double().numpy()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def slow_deletions(model, adata):
    """Shift of every deletion, one at a time: {gene: [shift, ...]}."""
    encoded = scfm.pp.encode(adata, model)
    shifts = {}
    for cell in range(adata.n_obs):
        one = encoded.select([cell])
        ids, values = one.gene_ids_T.tolist(), None if one.values_T is None else one.values_T.tolist()
        before = embed_tokens(model, ids, values)
        for place, token in enumerate(ids):
            if token not in model.encoding.vocabulary.gene_ids:
                continue
            after = embed_tokens(
                model, ids[:place] + ids[place + 1 :], None if values is None else values[:place] + values[place + 1 :]
            )
            shifts.setdefault(model.encoding.vocabulary.tokens[token], []).append(1 - cosine(before, after))
    return shifts


@pytest.mark.parametrize("kind", ["rank", "bin"])
def test_deletions_agree_with_a_plain_loop(cells, kind):
    model = toy_model(cells, kind)
    table = scfm.tl.perturb(cells, model, min_cells=1, progress=False)
    oracle = slow_deletions(model, cells)
    assert set(table.index) == set(oracle)
    for gene, shifts in oracle.items():
        assert table.loc[gene, "n_cells"] == len(shifts)
        assert table.loc[gene, "shift_mean"] == pytest.approx(np.mean(shifts), rel=1e-3, abs=1e-9)
        if len(shifts) > 1:
            assert table.loc[gene, "shift_std"] == pytest.approx(np.std(shifts, ddof=1), rel=1e-3, abs=1e-9)
    assert table["shift_mean"].is_monotonic_decreasing
    assert table.index.name == "gene"


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("pooling", ["mean", "weighted", "cls"])
@pytest.mark.parametrize(("kind", "positions"), [("rank", "shift"), ("rank", "held"), ("bin", "shift")])
def test_deletions_that_share_their_first_layer_are_the_plain_ones(cells, kind, positions, pooling, norm):
    """Oracle: every variant on its own. Runs of several lengths, the last of them shorter."""
    model = toy_model(cells, kind, add_cls=True)
    config = model.network.config.replace(norm=norm, final_norm=norm == "pre", pooling={"how": pooling})
    network = CellTransformer.for_vocabulary(config, model.encoding.vocabulary).eval()
    editor = Editor.of(model.encoding, "delete", positions=positions)
    encoded = scfm.pp.encode(cells, model)
    for number in (0, int(encoded.lengths_B.argmax())):
        cell = cell_of(encoded, number)
        one_by_one = [editor.edit(cell, [gene]) for gene in editor.expressed(cell)]
        expected = np.concatenate([embed_variants(network, [variant]) for variant in one_by_one])
        found = embed_deletions(network, cell, editor).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    assert shares_first_block(network, editor)


def test_tables_are_the_same_with_and_without_a_shared_first_layer(cells, rank_model, monkeypatch):
    twice = anndata.concat([cells, cells[:3]], index_unique="-")
    plain = scfm.tl.perturb(twice, rank_model, progress=False)
    monkeypatch.setattr("scfm.perturbation.runner.MIN_CELL", 8)  # some cells of each kind, some of them equal
    shared = scfm.tl.perturb(twice, rank_model, progress=False)
    pd.testing.assert_frame_equal(shared.sort_index(), plain.sort_index(), rtol=1e-3, atol=1e-9)


def test_bfloat16_is_near_float32(cells, rank_model):
    """Cells before and after in the same precision: else every shift would be the rounding of the weights."""
    single, half = (scfm.tl.perturb(cells, rank_model, precision=name, progress=False) for name in ("fp32", "bf16"))
    ratio = half.loc[single.index, "shift_mean"] / single["shift_mean"]
    assert ratio.median() == pytest.approx(1, abs=0.05)
    assert stats.spearmanr(half.loc[single.index, "shift_mean"], single["shift_mean"]).statistic > 0.97
    with pytest.raises(ValueError, match="`precision` is 'half'"):
        scfm.tl.perturb(cells, rank_model, precision="half", progress=False)


def test_held_deletion_keeps_the_ranks_of_later_genes(cells, rank_model):
    """Oracle: under "held" a gene's rank embedding is put in place by hand."""
    model = rank_model
    gene = model.encoding.vocabulary.tokens[int(scfm.pp.encode(cells[:1], model).gene_ids_T[1])]
    table = scfm.tl.perturb(cells[:1], model, genes=[gene], positions="held", progress=False)

    ids = scfm.pp.encode(cells[:1], model).gene_ids_T
    network = model.network
    keep = torch.tensor([place for place in range(len(ids)) if place != 1])
    with torch.inference_mode():
        hidden = network.embedding(ids[keep], None, keep)
        plan = scfm.ops.make_plan(torch.tensor([0, len(keep)]))
        for block in network.blocks:
            hidden = block(hidden, plan)
    after = hidden.mean(0).double().numpy()
    expected = 1 - cosine(embed_tokens(model, ids.tolist()), after)
    assert table.loc[gene, "shift_mean"] == pytest.approx(expected, rel=1e-3)
    shifted = scfm.tl.perturb(cells[:1], model, genes=[gene], progress=False)
    assert table.loc[gene, "shift_mean"] != pytest.approx(shifted.loc[gene, "shift_mean"], rel=1e-3)


RANKED = TokenCell(np.array([2, 10, 11, 12, 13, 14, 15, 16, 17, 3], dtype=np.int32))  # cls, eight genes, eos


@pytest.mark.parametrize(
    ("kind", "genes", "expected"),
    [
        ("delete", [12], [10, 11, 13, 14, 15, 16, 17]),
        ("delete", [12, 10], [11, 13, 14, 15, 16, 17]),
        ("overexpress", [15], [15, 10, 11, 12, 13, 14, 16, 17]),
        ("overexpress", [99], [99, 10, 11, 12, 13, 14, 15, 16, 17]),
        ("overexpress", [99, 13], [99, 13, 10, 11, 12, 14, 15, 16, 17]),
        ("inhibit", [11], [10, 12, 13, 11, 14, 15, 16, 17]),
        ("inhibit", [17], [10, 11, 12, 13, 14, 15, 16, 17]),
        ("activate", [15], [10, 11, 12, 15, 13, 14, 16, 17]),
        ("activate", [10], [10, 11, 12, 13, 14, 15, 16, 17]),
    ],
)
def test_edits_of_ranks(kind, genes, expected):
    editor = Editor(kind=kind, n_front=1, n_back=1)
    assert editor.edit(RANKED, genes).gene_ids_N.tolist() == [2, *expected, 3]


def test_overexpression_in_a_full_cell_drops_the_last_gene():
    editor = Editor(kind="overexpress", n_front=1, n_back=1, context_length=10)
    assert editor.edit(RANKED, [99]).gene_ids_N.tolist() == [2, 99, 10, 11, 12, 13, 14, 15, 16, 3]


BINNED = TokenCell(np.array([2, 10, 12, 14, 16], dtype=np.int32), np.array([-2, 1, 2, 3, 4], dtype=np.float32))


@pytest.mark.parametrize(
    ("kind", "gene", "ids", "values"),
    [
        ("delete", 12, [2, 10, 14, 16], [-2, 1, 3, 4]),
        ("overexpress", 10, [2, 10, 12, 14, 16], [-2, 4, 2, 3, 4]),
        ("overexpress", 13, [2, 10, 12, 13, 14, 16], [-2, 1, 2, 4, 3, 4]),
        ("inhibit", 16, [2, 10, 12, 14, 16], [-2, 1, 2, 3, 3]),
        ("activate", 10, [2, 10, 12, 14, 16], [-2, 2, 2, 3, 4]),
    ],
)
def test_edits_of_values(kind, gene, ids, values):
    edited = Editor(kind=kind, ordered=False, n_front=1).edit(BINNED, [gene])
    assert edited.gene_ids_N.tolist() == ids
    assert edited.values_N.tolist() == values


def test_deletion_where_zeros_have_tokens_sets_the_value_to_zero():
    panel = TokenCell(np.array([10, 11, 12], dtype=np.int32), np.array([0, 2, 1], dtype=np.float32))
    editor = Editor(kind="delete", ordered=False, keeps_zeros=True)
    assert editor.expressed(panel).tolist() == [11, 12]
    assert editor.edit(panel, [11]).values_N.tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", ["rank", "bin"])
def test_combinations_and_what_they_add_to_the_single_effects(cells, kind):
    model = toy_model(cells, kind)
    expressed = np.asarray((cells.X > 0).sum(0)).ravel()
    names = cells.var_names[np.argsort(-expressed)[:3]].tolist()
    pairs = scfm.tl.perturb(cells, model, genes=names, combine=2, progress=False)
    assert set(pairs.index) == {"+".join(p) for p in [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]}
    both = cells[(cells[:, names[:2]].X.toarray() > 0).all(1)].copy()
    pair = pairs.loc["+".join(names[:2])]
    assert pair["n_cells"] == both.n_obs
    singles = scfm.tl.perturb(both, model, genes=names[:2], progress=False)["shift_mean"].sum()
    assert pair["excess_mean"] == pytest.approx(pair["shift_mean"] - singles, abs=1e-9)


def test_goal_shift_agrees_with_cosines_and_uses_the_start_cells_only(cells, rank_model):
    adata = cells.copy()
    adata.obs["state"] = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    gene = adata.var_names[np.argmax(np.asarray((adata[:4].X > 0).sum(0)).ravel())]
    table = scfm.tl.perturb(adata, rank_model, genes=[gene], groupby="state", start="a", goal="b", progress=False)
    encoded = scfm.pp.encode(adata, rank_model)
    goal = rank_model.embed(encoded)[4:8].mean(0).astype(float)
    shifts = []
    for cell in range(4):
        ids = encoded.select([cell]).gene_ids_T.tolist()
        token = int(rank_model.encoding.vocabulary.token_ids([gene])[0])
        if token in ids:
            after = embed_tokens(rank_model, [i for i in ids if i != token])
            shifts.append(cosine(after, goal) - cosine(embed_tokens(rank_model, ids), goal))
    assert table.loc[gene, "n_cells"] == len(shifts)
    assert table.loc[gene, "goal_shift_mean"] == pytest.approx(np.mean(shifts), rel=1e-3, abs=1e-8)


def test_equal_variants_are_computed_once(cells, rank_model):
    twice = anndata.concat([cells[:2], cells[:2]], index_unique="-")
    encoded = scfm.pp.encode(twice, rank_model)
    runner = VariantRunner(
        rank_model, encoded, Perturbations(None, rank_model.encoding.vocabulary.tokens), Editor(kind="delete")
    )
    n_of_cell = np.array([runner.n_of_cell(cell) for cell in range(4)])
    list(runner.blocks(n_of_cell))
    assert runner.n_embedded == n_of_cell.sum() // 2


def test_a_run_continues_from_its_checkpoint(cells, rank_model, tmp_path, monkeypatch):
    whole = scfm.tl.perturb(cells, rank_model, progress=False)
    monkeypatch.setattr(VariantRunner, "variants_per_block", 20)
    path = tmp_path / "run.npz"
    seen = []
    original = VariantRunner.run_block

    def stops_at_the_third(self, start, stop):
        seen.append(start)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, start, stop)

    monkeypatch.setattr(VariantRunner, "run_block", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        scfm.tl.perturb(cells, rank_model, checkpoint=path, progress=False)
    continued = scfm.tl.perturb(cells, rank_model, checkpoint=path, progress=False)
    assert seen.count(0) == 1  # the first block was not run again
    pd.testing.assert_frame_equal(continued.sort_index(), whole.sort_index(), rtol=1e-12)
    with pytest.raises(ValueError, match="other cells, another model or other settings"):
        scfm.tl.perturb(cells[:5], rank_model, checkpoint=path, progress=False)


def test_record_agrees_with_pandas_in_any_order_of_arrival():
    rng = np.random.default_rng(0)
    row, cell = rng.integers(0, 5, 300), np.arange(300)
    values = 1e-7 * (1 + rng.random((300, 1)))
    record = ShiftRecord(["shift"], n_rows=6)
    shuffled = rng.permutation(300)
    for part in np.array_split(shuffled, 7):
        record.add(row[part], cell[part], values[part])
    expected = pd.DataFrame({"row": row, "shift": values[:, 0]}).groupby("row")["shift"].agg(["size", "mean", "std"])
    assert record.rows.tolist() == expected.index.tolist()
    np.testing.assert_allclose(record.mean("shift"), expected["mean"], rtol=1e-12)
    np.testing.assert_allclose(record.std("shift"), expected["std"], rtol=1e-9)
    at_once = ShiftRecord(["shift"], n_rows=6)
    at_once.add(row, cell, values)
    np.testing.assert_array_equal(record.values(2, "shift"), at_once.values(2, "shift"))


def test_record_keeps_a_bounded_sample():
    record = ShiftRecord(["shift"], n_rows=1)
    for part in range(10):
        record.add(np.zeros(200, int), np.arange(200) + 200 * part, np.full((200, 1), float(part)))
    assert record.n_R[0] == 2000
    assert len(record.values(0, "shift")) == KEPT
    assert record.values(0, "shift").mean() == pytest.approx(4.5, abs=0.6)  # 4.5 expected, standard error 0.13


def test_rank_sum_agrees_with_scipy():
    rng = np.random.default_rng(1)
    groups = [np.round(rng.normal(shift, 1, n), 1) for shift, n in [(0, 30), (0.5, 12), (1, 5), (0, 1)]]
    record = ShiftRecord(["shift"], n_rows=4)
    for number, group in enumerate(groups):
        record.add(np.full(len(group), number), np.arange(len(group)), group[:, None])
    null = Null(np.array([0, 3]), "a null", np.array([3]))
    against_rest, against_null = rank_sum(record, "shift"), rank_sum(record, "shift", null=null)
    for number, group in enumerate(groups):
        rest = np.concatenate([other for place, other in enumerate(groups) if place != number])
        expected = stats.mannwhitneyu(group, rest, method="asymptotic")
        line = against_rest.iloc[number]
        assert line["p_value"] == pytest.approx(expected.pvalue, rel=1e-9)
        assert line["effect_size"] == pytest.approx(2 * expected.statistic / len(group) / len(rest) - 1)
    expected = stats.mannwhitneyu(groups[1], np.concatenate([groups[0], groups[3]]), method="asymptotic").pvalue
    assert against_null["p_value"][1] == pytest.approx(expected)
    expected = stats.mannwhitneyu(groups[0], groups[3], method="asymptotic").pvalue
    assert against_null["p_value"][0] == pytest.approx(expected)
    np.testing.assert_allclose(against_rest["fdr"], stats.false_discovery_control(against_rest["p_value"]))
    # A row that is there for the null alone is not one of the tests.
    np.testing.assert_allclose(against_null["fdr"][:3], stats.false_discovery_control(against_null["p_value"][:3]))
    assert np.isnan(against_null["fdr"][3])


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_ranks_and_false_discovery_rates_are_those_of_scipy(decimals):
    values = np.random.default_rng(decimals).normal(size=500).round(decimals)
    np.testing.assert_array_equal(average_ranks(values)[0], stats.rankdata(values))
    assert np.isnan(average_ranks(np.append(values, np.nan))[0]).all()
    p_values = np.random.default_rng(decimals).uniform(0, 1, 50).round(decimals) ** 3
    expected = stats.false_discovery_control(p_values)
    np.testing.assert_array_equal(false_discovery_rate(p_values), expected)
    with_nan = false_discovery_rate(np.insert(p_values, 7, np.nan))
    assert np.flatnonzero(np.isnan(with_nan)).tolist() == [7]
    np.testing.assert_array_equal(np.delete(with_nan, 7), expected)
    assert false_discovery_rate(np.zeros(0)).shape == (0,)


def test_bootstrap_interval_agrees_with_scipy():
    values = np.random.default_rng(2).gamma(2, size=80)
    expected = stats.bootstrap([values], np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    low, high = bootstrap_interval(values, n_bootstrap=4000, seed=0)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_tiny_shifts_are_exact():
    rng = np.random.default_rng(3)
    before = rng.normal(size=(1, 64))
    step = rng.normal(size=64) * 1e-9
    after, goal = before + step, rng.normal(size=64)
    u = before[0] / np.linalg.norm(before)
    expected = ((step @ step) - (step @ u) ** 2) / (before[0] @ before[0]) / 2
    assert cosine_distance(before, after)[0] == pytest.approx(expected, rel=1e-5)
    along = (goal / np.linalg.norm(goal) - cosine(before[0], goal) * u) @ step / np.linalg.norm(before)
    assert goal_shift(before, after, goal)[0] == pytest.approx(along, rel=1e-5)


def test_null_genes_are_named_and_left_out_of_the_table(cells, rank_model):
    expressed = cells.var_names[np.argsort(-np.asarray((cells.X > 0).sum(0)).ravel())]
    table = scfm.tl.perturb(
        cells, rank_model, genes=expressed[:2].tolist(), null_genes=expressed[2:6].tolist(), progress=False
    )
    assert set(table.index) == set(expressed[:2])
    assert set(table["null"]) == {"4 given null genes"}


def test_a_short_list_is_tested_against_genes_that_as_many_cells_express(rank_model, cells):
    n_cells = pd.Series(np.asarray((cells.X > 0).sum(0)).ravel(), cells.var_names)
    rare, common = n_cells[n_cells == 2].index[0], n_cells.idxmax()
    for gene in (rare, common):
        table = scfm.tl.perturb(cells, rank_model, genes=[gene], n_bootstrap=0, progress=False)
        null = table.attrs["null_genes"]
        assert list(table.index) == [gene]
        assert gene not in null
        assert table.loc[gene, "null"] == f"{len(null)} genes matched by expression"
        singles = scfm.tl.perturb(cells, rank_model, genes=null, null_genes=null, n_bootstrap=0, progress=False)
        pooled = (singles["shift_mean"] * singles["n_cells"]).sum() / singles["n_cells"].sum()
        assert table.loc[gene, "null_mean"] == pytest.approx(pooled, rel=1e-6)
    both = scfm.tl.perturb(cells, rank_model, genes=[rare, common], n_bootstrap=0, progress=False)
    assert not {rare, common} & set(both.attrs["null_genes"])
    assert both.loc[rare, "p_value"] != both.loc[common, "p_value"]


def test_null_genes_are_those_nearest_in_the_number_of_cells():
    """Oracle: gene t is in t of 599 cells; 50 drawn from the nearest 100 lie within 51 of the wanted number."""
    vocabulary = scfm.Vocabulary([f"G{gene}" for gene in range(600)])
    lengths = [600 - first for first in range(1, 600)]
    cells = scfm.CellBatch(
        gene_ids_T=torch.cat([torch.arange(first, 600) for first in range(1, 600)]).int(),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)]),
    )
    asked = Perturbations.of(["G300", ["G100", "G500"]], vocabulary)
    joined = with_matched_null(asked, cells, vocabulary, Editor(kind="delete"), seed=0)
    null = joined.tokens[2:]
    assert 90 <= len(null) <= 100
    assert len(joined.null_cells) == 200
    assert all(abs(group[0] - 300) <= 51 for group in null if len(group) == 1)
    assert all(abs(group[0] - 100) <= 51 and abs(group[1] - 500) <= 51 for group in null if len(group) == 2)
    assert not {100, 300, 500} & {token for group in null for token in group}


def test_genes_that_cannot_be_perturbed_stay_as_rows_with_their_reason(cells):
    model, adata = toy_model(cells, "rank", context_length=4), cells.copy()
    counts = adata.X.tolil()
    silent = adata.var_names[np.argmin(np.where(counts.getnnz(0) > 0, counts.getnnz(0), 99))]
    counts[:, adata.var_names.get_loc(silent)] = 0
    adata.X = counts.tocsr()
    n_cells = pd.Series(np.asarray((adata.X > 0).sum(0)).ravel(), adata.var_names)
    tokens = scfm.pp.encode(adata, model).gene_ids_T.numpy()
    encoded = {model.encoding.vocabulary.tokens[token] for token in tokens}
    unread = n_cells[[gene for gene in n_cells.index if gene not in encoded]].idxmax()
    assert n_cells[silent] == 0
    present = sorted(encoded)[0]
    table = scfm.tl.perturb(
        adata, model, genes=[unread, silent, present.lower(), present, [present, unread]], progress=False
    )
    assert list(table.index) == [present, unread, silent, f"{present}+{unread}", present.lower()]
    assert table["n_cells"].tolist()[1:] == [0, 0, 0, 0]
    assert table.loc[present, "reason"] == ""
    beyond = f"{n_cells[unread]} cells express '{unread}', but in all of them it is not among the first 4 tokens"
    assert table.loc[unread, "reason"] == table.loc[f"{present}+{unread}", "reason"] == beyond
    assert table.loc[silent, "reason"] == f"no cell expresses '{silent}'"
    assert f"Did you mean '{present}'?" in table.loc[present.lower(), "reason"]
    alone = scfm.tl.perturb(adata, model, genes=[present], progress=False)
    pd.testing.assert_frame_equal(table.loc[[present], ["n_cells", "shift_mean"]], alone[["n_cells", "shift_mean"]])
    with pytest.raises(VocabularyMismatchError, match=f"1 of 2 perturbations cannot be done.*'{silent}'"):
        scfm.tl.perturb(adata, model, genes=[present, silent], missing="error", progress=False)
    with pytest.raises(VocabularyMismatchError, match=r"1 of 1 perturbations.*not among the first 4 tokens"):
        scfm.tl.perturb(adata, model, genes=[unread], progress=False)


def test_a_gene_named_twice_is_one_gene(cells, rank_model):
    gene = cells.var_names[np.argmax(np.asarray((cells.X > 0).sum(0)).ravel())]
    one, two = (
        scfm.tl.perturb(cells, rank_model, genes=[entry], n_bootstrap=0, progress=False)
        for entry in (gene, [gene, gene])
    )
    pd.testing.assert_frame_equal(one, two)


def test_the_table_survives_h5ad(cells, rank_model, tmp_path):
    adata = cells.copy()
    table = scfm.tl.perturb(adata, rank_model, key_added="deletions", progress=False)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(back.uns["deletions"], table, check_dtype=False)
    assert back.uns["scfm"]["deletions"]["kind"] == "delete"


def test_no_cells_at_all_are_named(cells, rank_model):
    with pytest.raises(EmptyCellError, match="The data hold no cells"):
        scfm.tl.perturb(cells[:0].copy(), rank_model, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "remove"}, ValueError, "`kind` is 'remove'"),
        ({"genes": ["NOT_A_GENE"]}, VocabularyMismatchError, "NOT_A_GENE"),
        ({"genes": "ISG15"}, ValueError, "pass a list"),
        ({"genes": ["ISG15", []]}, ValueError, r"the entry \[\]"),
        ({"genes": [3]}, ValueError, "the entry 3"),
        ({"genes": ["<pad>"]}, VocabularyMismatchError, "not a gene"),
        ({"genes": ["ISG15"], "missing": "drop"}, ValueError, "choose 'report' or 'error'"),
        ({"combine": 2}, ValueError, "needs the `genes`"),
        ({"goal": "b"}, LabelsError, "without `groupby`"),
        ({"groupby": "state", "goal": "nowhere"}, LabelsError, "nowhere"),
        ({"kind": "activate", "quantile": 2.0}, ValueError, "`quantile` is 2.0"),
        ({"kind": "activate", "positions": "held"}, ValueError, "for deletions"),
        ({"effect_on": "genes"}, ValueError, "name the `genes`"),
        ({"effect_on": "clusters"}, ValueError, "choose 'cell' or 'genes'"),
        (
            {"effect_on": "genes", "genes": ["CD74"], "groupby": "state", "goal": "a"},
            ValueError,
            "for cells only; omit it",
        ),
    ],
)
def test_bad_arguments_are_named(cells, rank_model, arguments, error, message):
    adata = cells.copy()
    adata.obs["state"] = "a"
    with pytest.raises(error, match=message):
        scfm.tl.perturb(adata, rank_model, progress=False, **arguments)


def test_perturbations_of_few_cells_come_last(cells, rank_model):
    every = scfm.tl.perturb(cells, rank_model, min_cells=1, n_bootstrap=0, progress=False)
    table = scfm.tl.perturb(cells, rank_model, n_bootstrap=0, progress=False)
    many, few = every[every["n_cells"] >= 3], every[every["n_cells"] < 3]
    assert len(few) > 0
    assert every["shift_mean"].is_monotonic_decreasing
    pd.testing.assert_frame_equal(table, pd.concat([many, few]))
