"""scBERT and scFoundation checkpoints against plain torch re-implementations, with random weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

import scfm
from scfm.data import CellBatch
from scfm.errors import ModelFileError
from scfm.families import convert


def _beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published, performer = _beside("conftest"), _beside("performer")
GENES = {f"GENE{place}": place for place in range(30)}
N_CELLS = 3


def panel_cells(n_positions, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(values), (N_CELLS, n_positions), generator=generator)
    return CellBatch(
        gene_ids_T=torch.arange(n_positions, dtype=torch.int32).repeat(N_CELLS),
        cu_seqlens=torch.arange(N_CELLS + 1, dtype=torch.int32) * n_positions,
        values_T=torch.tensor(values, dtype=torch.float32)[choice].flatten(),
    )


def each_cell(function, cells):
    with torch.no_grad():
        return [
            function(ids, values)
            for ids, values in zip(
                cells.gene_ids_T.long().split(cells.lengths_B.tolist()), cells.values_T.split(cells.lengths_B.tolist())
            )
        ]


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def scbert_file(path, **options):
    torch.manual_seed(0)
    peer = published.shaken(performer.ScBert(len(GENES) + 1, **options))
    torch.save({"epoch": 3, "model_state_dict": peer.state_dict()}, path)
    return peer


@pytest.mark.parametrize(("per_cell", "atol"), [(True, 1e-5), (False, 1e-2)])
def test_scbert_states_and_bucket_logits(tmp_path, per_cell, atol, monkeypatch):
    # The published maximum, over the batch, agrees with ours, over cell and head, up to the constant 1e-4 in each feature.
    monkeypatch.setattr(performer.SelfAttention, "per_cell", per_cell)
    peer = scbert_file(tmp_path / "model.pth")
    model = scfm.load(tmp_path / "model.pth", vocabulary=GENES)
    cells = panel_cells(len(GENES) + 1, range(7))
    with torch.no_grad():
        hidden_TD = model.network(cells)
        logits_TS = model.network.values(hidden_TD)
    close(hidden_TD, torch.cat(each_cell(lambda _, values: peer.states(values.long()), cells)), atol)
    close(logits_TS, torch.cat(each_cell(lambda _, values: peer(values.long()), cells)), atol)


def test_scbert_classifier(tmp_path):
    peer = scbert_file(tmp_path / "model.pth", n_classes=4)
    model = scfm.load(tmp_path / "model.pth", vocabulary=GENES)
    cells = panel_cells(len(GENES) + 1, range(6))
    with torch.no_grad():
        logits_BC = model.network.class_logits(cells)
    close(logits_BC, torch.stack(each_cell(lambda _, values: peer(values.long()), cells)))
    assert model.predict_proba(cells).shape == (N_CELLS, 4)


@pytest.mark.parametrize("n_classes", [0, 4])
@pytest.mark.parametrize("updater", [False, True])
def test_scbert_round_trips_to_the_bit(tmp_path, n_classes, updater):
    state = performer.ScBert(len(GENES) + 1, n_classes=n_classes).state_dict()
    if updater:  # later versions of the package keep the counter, and all layers once more, under `proj_updater`
        state["performer.proj_updater.calls_since_last_redraw"] = state.pop("performer.calls_since_last_redraw")
        layers = {name: tensor for name, tensor in state.items() if name.startswith("performer.net.")}
        state |= {name.replace("performer.net.", "performer.proj_updater.instance."): t for name, t in layers.items()}
    torch.save({"model_state_dict": state}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours", vocabulary=GENES)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    again = torch.load(tmp_path / "back.pth", weights_only=True)["model_state_dict"]
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_scbert_with_another_panel_is_an_error(tmp_path):
    scbert_file(tmp_path / "model.pth")
    with pytest.raises(ModelFileError, match="31 positions, but the vocabulary has 30"):
        scfm.load(tmp_path / "model.pth", vocabulary=dict(list(GENES.items())[:-1]))
    with pytest.raises(ModelFileError, match="vocabulary="):
        scfm.load(tmp_path / "model.pth")


N_POSITIONS = len(GENES) + 3
SETTINGS = {
    "model_config": {
        "mae_autobin": {
            "encoder": {"module_type": "transformer", "hidden_dim": 24, "depth": 2, "heads": 4, "dim_head": 6},
            "decoder": {"module_type": "performer", "hidden_dim": 20, "depth": 2, "heads": 2, "dim_head": 8},
            "n_class": 1,
            "bin_num": 10,
            "bin_alpha": 1.0,
        }
    },
    "dataset_config": {"rnaseq": {"seq_len": len(GENES) + 2, "pad_token_id": 103, "mask_token_id": 102}},
}


def scfoundation_file(path, part="cell"):
    torch.manual_seed(0)
    peer = published.shaken(performer.ScFoundation(N_POSITIONS))
    state = {f"model.{name}": tensor for name, tensor in peer.state_dict().items()}
    torch.save({part: {"state_dict": state, "config": SETTINGS}}, path)
    return peer, state


def test_scfoundation_encoder_decoder_and_values(tmp_path):
    peer, _ = scfoundation_file(tmp_path / "model.ckpt")
    model = scfm.load(tmp_path / "model.ckpt", vocabulary=GENES)
    cells = panel_cells(N_POSITIONS - 1, [-1.0, 0.0, 0.0, 0.7, 2.3, 3.9])
    with torch.no_grad():
        states_TE = model.network.value_states(cells)
        values_T = model.network.values(states_TE)
    expected_TE = torch.cat(each_cell(peer, cells))
    close(states_TE, expected_TE)
    with torch.no_grad():
        close(values_T, peer.to_final(expected_TE).squeeze(-1))


def test_scfoundation_embedding_is_depths_max_and_mean(tmp_path):
    peer, _ = scfoundation_file(tmp_path / "model.ckpt")
    model = scfm.load(tmp_path / "model.ckpt", vocabulary=GENES)
    cells = panel_cells(N_POSITIONS - 1, [0.4, 0.7, 2.3, 3.9])
    states = each_cell(peer.encode, cells)
    expected_BD = torch.stack(
        [torch.cat([x[-1], x[-2], x[:-2].amax(0), x[:-2].mean(0)]) for x in states]  # S, T, max, mean
    )
    close(torch.from_numpy(model.embed(cells)), expected_BD)


@pytest.mark.parametrize("part", ["cell", "gene"])
def test_scfoundation_round_trips_to_the_bit(tmp_path, part):
    _, state = scfoundation_file(tmp_path / "theirs.ckpt", part)
    convert(tmp_path / "theirs.ckpt", tmp_path / "ours", vocabulary=GENES)
    convert(tmp_path / "ours", tmp_path / "back.ckpt")
    again = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert set(again) == {part}
    assert again[part]["config"] == SETTINGS
    assert set(again[part]["state_dict"]) == set(state)
    assert all(torch.equal(again[part]["state_dict"][name], state[name]) for name in state)


def test_files_of_no_known_kind_say_what_is_understood(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ModelFileError, match="scfm reads: a Geneformer directory"):
        scfm.load(tmp_path / "other.pt")


def test_random_features_are_drawn_anew_in_training_only(tmp_path):
    scbert_file(tmp_path / "model.pth")
    network = scfm.load(tmp_path / "model.pth", vocabulary=GENES).network
    cells, projection = panel_cells(len(GENES) + 1, range(6)), network.blocks[0].attention.projection_MK
    before = projection.clone()
    network.calls_since_redraw.fill_(network.config.redraw_interval)
    network(cells)
    assert torch.equal(projection, before)
    network.train()(cells)
    assert not torch.equal(projection, before)
    assert int(network.calls_since_redraw) == 0
