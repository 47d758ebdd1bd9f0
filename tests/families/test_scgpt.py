"""scGPT checkpoints against the published package's `TransformerModel`, with random weights."""

import importlib
import importlib.util
import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import scfm
from scfm.errors import ModelFileError
from scfm.families import convert

_spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("conftest.py"))
published = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published)

GENES = [f"GENE{place}" for place in range(60)]
TOKENS = {token: place for place, token in enumerate([*GENES, "<pad>", "<cls>", "<eoc>"])}
ARGUMENTS = {
    "embsize": 32,
    "nheads": 4,
    "d_hid": 48,
    "nlayers": 3,
    "n_layers_cls": 3,
    "dropout": 0.2,
    "n_bins": 51,
    "input_emb_style": "continuous",
    "max_seq_len": 64,
    "pad_value": -2,
    "mask_value": -1,
    "pad_token": "<pad>",
}


def published_class():
    """scGPT's class, imported past the package's `__init__`, which needs torchtext (no longer built for torch)."""
    spec = importlib.util.find_spec("scgpt")
    if spec is None:
        pytest.skip("needs the published package: pip install --no-deps scgpt==0.2.4")
    stub = types.ModuleType("scgpt_models")
    stub.__path__ = [str(Path(spec.origin).parent / "model")]
    sys.modules["scgpt_models"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that flash-attn is not there
        return importlib.import_module("scgpt_models.model").TransformerModel


@pytest.fixture(scope="module")
def transformer_model():
    return published_class()


def build(transformer_model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks on nested tensors
        peer = transformer_model(
            len(TOKENS), 32, 4, 48, 3, vocab=TOKENS, pad_token="<pad>", pad_value=-2, dropout=0.2, **options
        )
    published.shaken(peer)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in peer.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return peer


def save(folder, state, **arguments):
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps(ARGUMENTS | arguments))
    (folder / "vocab.json").write_text(json.dumps(TOKENS))
    torch.save(state, folder / "best_model.pt")


def run(peer, cells, **options):
    ids_BL = published.padded(cells.gene_ids_T.long(), cells, fill=TOKENS["<pad>"])
    values_BL = published.padded(cells.values_T, cells, fill=-2.0)
    if cells.batch_ids_B is not None:
        options["batch_labels"] = cells.batch_ids_B
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peer(ids_BL, values_BL, ids_BL == TOKENS["<pad>"], **options)


def scgpt_cells(ragged):
    """Cells that start with <cls>, with bins, masked values and a value beyond the clamp."""
    cells = ragged(len(GENES), values=[-1, 0, 1, 17, 50, 600])
    ids_T, values_T = cells.gene_ids_T.clone(), cells.values_T.clone()
    ids_T[cells.cu_seqlens[:-1]], values_T[cells.cu_seqlens[:-1]] = TOKENS["<cls>"], -2
    return cells.replace(gene_ids_T=ids_T, values_T=values_T)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_embeddings_and_decoders_are_those_of_the_package(transformer_model, tmp_path, ragged):
    peer = build(transformer_model, do_mvc=True, n_cls=5, explicit_zero_prob=True)
    save(tmp_path / "model", peer.state_dict())
    model, cells = scfm.load(tmp_path / "model"), scgpt_cells(ragged)
    theirs = run(peer, cells, CLS=True, MVC=True)
    network, cell_T = model.network, cells.cell_of_token_T()
    with torch.no_grad():
        hidden_TD = network(cells)
        cell_TD = network.pool(hidden_TD, cells)[cell_T]
        genes_TD = network.embedding.genes(cells.gene_ids_T)
        close(network.embed_cells(cells), theirs["cell_emb"])
        close(network.values(hidden_TD), published.packed(theirs["mlm_output"], cells))
        close(torch.sigmoid(network.value_head.nonzero(hidden_TD)), published.packed(theirs["mlm_zero_probs"], cells))
        close(network.values_from_cells(cell_TD, cells.gene_ids_T), published.packed(theirs["mvc_output"], cells))
        zero_T = torch.sigmoid(network.value_from_cell_head.nonzero_logits(cell_TD, genes_TD))
        close(zero_T, published.packed(theirs["mvc_zero_probs"], cells))
        close(network.class_logits(cells), theirs["cls_output"])
    np.testing.assert_allclose(np.linalg.norm(model.embed(cells), axis=1), 1, rtol=1e-6)
    assert model.labels == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("norm", ["dsbn", "batchnorm", False])
def test_batch_labels_batch_norm_and_discriminator_are_those_of_the_package(transformer_model, tmp_path, ragged, norm):
    peer = build(
        transformer_model,
        do_dab=True,
        use_batch_labels=True,
        num_batch_labels=3,
        domain_spec_batchnorm=norm,
        do_mvc=True,
    )
    save(tmp_path / "model", peer.state_dict())
    model = scfm.load(tmp_path / "model")
    for domain in range(3):  # published code normalizes a batch by the domain of its first cell
        cells = scgpt_cells(ragged)
        cells = cells.replace(batch_ids_B=torch.full((len(cells),), domain))
        theirs = run(peer, cells, MVC=True)
        batch_T = cells.batch_ids_B[cells.cell_of_token_T()]
        with torch.no_grad():
            hidden_TD = model.network(cells)
            close(model.network.values(hidden_TD, batch_T), published.packed(theirs["mlm_output"], cells))
            close(model.network.batch_head(model.network.pool(hidden_TD, cells)), theirs["dab_output"])


@pytest.mark.parametrize("layout", ["in_proj_", "Wqkv.", "_impl.Wqkv."])
def test_each_attention_layout_round_trips_to_the_bit(transformer_model, tmp_path, ragged, layout):
    peer = build(transformer_model, do_mvc=True)
    state = {name.replace("in_proj_", layout): tensor for name, tensor in peer.state_dict().items()}
    state["flag_encoder.weight"] = torch.randn(2, 32)
    save(tmp_path / "theirs", state)
    model, cells = scfm.load(tmp_path / "theirs"), scgpt_cells(ragged)
    with torch.no_grad():
        close(model.network.embed_cells(cells), run(peer, cells)["cell_emb"])
    assert model.checkpoint.unused == {}
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    again = torch.load(tmp_path / "back" / "best_model.pt", weights_only=True)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
    arguments = json.loads((tmp_path / "back" / "args.json").read_text())
    assert arguments.items() >= ARGUMENTS.items()


def test_a_tensor_out_of_place_is_an_error(transformer_model, tmp_path):
    state = build(transformer_model, do_mvc=True).state_dict()
    state["decoder.fc.6.weight"] = state.pop("decoder.fc.4.weight")
    save(tmp_path / "model", state)
    with pytest.raises(ModelFileError, match=r"missing: decoder\.fc\.4\.weight\n.*unknown: decoder\.fc\.6\.weight"):
        scfm.load(tmp_path / "model")


def test_a_truncated_file_is_an_error(transformer_model, tmp_path):
    save(tmp_path / "model", build(transformer_model).state_dict())
    weights = tmp_path / "model" / "best_model.pt"
    weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(ModelFileError, match="is cut short"):
        scfm.load(tmp_path / "model")


def test_the_published_settings_and_vocabulary_make_the_published_preset(scfm_data):
    from scfm.encoding import read_vocabulary
    from scfm.families import preset
    from scfm.families.scgpt import _model_config

    arguments = json.loads((scfm_data / "vocab" / "scgpt_human_finetuned_model_args.json").read_text())
    vocabulary = read_vocabulary(scfm_data / "vocab" / "scgpt_human_finetuned_model_vocab.json")
    names = ["flag_encoder.weight", "mvc_decoder.gene2query.weight"]
    config = _model_config(arguments, vocabulary, dict.fromkeys(names, torch.zeros(2, 2)), Path("published"))
    assert config == preset("scgpt-human").model_config()
