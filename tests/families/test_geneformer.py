"""Geneformer checkpoints against transformers' BERT, with random weights."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import scfm
from scfm.errors import ModelFileError
from scfm.families import convert

transformers = pytest.importorskip("transformers")
_spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("conftest.py"))
published = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published)

N_GENES = 60


def save_bert(folder, kind, *, v2, labels=3):
    tokens = published.tokens_of(N_GENES, v2=v2)
    extra = {} if kind == "BertForMaskedLM" else {"num_labels": labels}
    config = published.bert_config(len(tokens), **extra)
    if extra:
        config.id2label = {place: f"type {place}" for place in range(labels)}
    bert = published.shaken(getattr(transformers, kind)(config))
    bert.save_pretrained(folder)
    published.write_dictionaries(folder, tokens)
    return bert


def run_bert(bert, cells):
    ids_BL = published.padded(cells.gene_ids_T.long(), cells)
    mask_BL = published.padded(torch.ones(cells.n_tokens), cells)
    with torch.no_grad():
        return bert(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True)


@pytest.mark.parametrize("v2", [False, True])
def test_every_hidden_state_and_the_logits_are_those_of_bert(tmp_path, ragged, v2):
    bert = save_bert(tmp_path / "model", "BertForMaskedLM", v2=v2)
    model = scfm.load(tmp_path / "model")
    cells = ragged(len(model.encoding.vocabulary))
    theirs = run_bert(bert, cells)
    with torch.no_grad():
        ours = list(model.network.hidden_states(cells))
        logits_TV = model.network.gene_logits(ours[-1])
    assert len(ours) == len(theirs.hidden_states)
    for hidden_TD, hidden_BLD in zip(ours, theirs.hidden_states):
        torch.testing.assert_close(hidden_TD, published.packed(hidden_BLD, cells), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_TV, published.packed(theirs.logits, cells), rtol=0, atol=1e-5)


def test_the_10m_shape_agrees_with_bert(tmp_path, ragged):
    config = published.bert_config(500, hidden_size=256, num_hidden_layers=6, intermediate_size=512)
    bert = published.shaken(transformers.BertForMaskedLM(config))
    bert.save_pretrained(tmp_path)
    published.write_dictionaries(tmp_path, published.tokens_of(498, v2=False))
    model, cells = scfm.load(tmp_path), ragged(500)
    theirs = run_bert(bert, cells)
    for layer, hidden_BLD in enumerate(theirs.hidden_states):
        with torch.no_grad():
            hidden_TD = model.network(cells, hidden_layer=layer)
        torch.testing.assert_close(hidden_TD, published.packed(hidden_BLD, cells), rtol=0, atol=1e-5)


def test_cell_classifier_agrees_with_bert(tmp_path, ragged):
    bert = save_bert(tmp_path, "BertForSequenceClassification", v2=True)
    model = scfm.load(tmp_path)
    assert model.labels == ("type 0", "type 1", "type 2")
    cells = ragged(len(model.encoding.vocabulary))
    expected = run_bert(bert, cells).logits
    np.testing.assert_allclose(model.predict_proba(cells), expected.softmax(-1).numpy(), rtol=0, atol=1e-5)


def test_gene_classifier_agrees_with_bert(tmp_path, ragged):
    bert = save_bert(tmp_path, "BertForTokenClassification", v2=False)
    model = scfm.load(tmp_path)
    cells = ragged(len(model.encoding.vocabulary))
    with torch.no_grad():
        logits_TC = model.network.class_logits(cells)
    expected = published.packed(run_bert(bert, cells).logits, cells)
    torch.testing.assert_close(logits_TC, expected, rtol=0, atol=1e-5)
    with pytest.raises(scfm.errors.ModelTaskError, match="genes"):
        model.predict_proba(cells)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"])
def test_round_trip_leaves_every_tensor_the_same(tmp_path, kind):
    save_bert(tmp_path / "theirs", kind, v2=True)
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    reopened = getattr(transformers, kind).from_pretrained(tmp_path / "back")
    assert reopened.config.id2label == transformers.AutoConfig.from_pretrained(tmp_path / "theirs").id2label


def test_a_model_trained_here_opens_in_transformers(tmp_path, ragged):
    adata = scfm.datasets.pbmc()
    model = scfm.fit(adata, config=scfm.FitConfig(n_steps=1), progress=False)
    model.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "bert")
    bert = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    cells = ragged(len(model.encoding.vocabulary))
    with torch.no_grad():
        hidden_TD = model.network(cells)
    theirs = run_bert(bert, cells).hidden_states[-1]
    torch.testing.assert_close(hidden_TD, published.packed(theirs, cells), rtol=0, atol=1e-5)
    again = scfm.load(tmp_path / "bert")
    np.testing.assert_array_equal(again.encoding.medians, model.encoding.medians)
    assert again.encoding.vocabulary.tokens == model.encoding.vocabulary.tokens


def test_old_bin_files_may_repeat_tied_tensors_but_not_change_them(tmp_path):
    bert = save_bert(tmp_path, "BertForMaskedLM", v2=False)
    (tmp_path / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    state["bert.embeddings.position_ids"] = torch.arange(64)[None]
    assert "cls.predictions.decoder.weight" in state
    torch.save(state, tmp_path / "pytorch_model.bin")
    unused = scfm.load(tmp_path).checkpoint.unused
    assert set(unused) == {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "bert.embeddings.position_ids",
    }
    state["cls.predictions.decoder.weight"][3, 3] += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"decoder\.weight must be equal to"):
        scfm.load(tmp_path)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop(QUERY), f"missing: {QUERY}"),
        (lambda state: state.update(extra=torch.zeros(2)), "unknown: extra"),
        (lambda state: state.update({QUERY: torch.zeros(16, 32)}), rf"shape: {QUERY} is \(16, 32\), not \(32, 32\)"),
    ],
)
def test_a_tensor_out_of_place_is_an_error_that_names_it(tmp_path, damage, message):
    save_bert(tmp_path, "BertForMaskedLM", v2=False)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=message):
        scfm.load(tmp_path)
    with pytest.warns(UserWarning, match=message):
        assert scfm.load(tmp_path, strict=False).network.config.n_layers == 3


def test_truncated_weights_are_an_error(tmp_path):
    save_bert(tmp_path, "BertForMaskedLM", v2=False)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="cut short"):
        scfm.load(tmp_path)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_malicious_bin_file_is_refused_and_not_run(tmp_path):
    save_bert(tmp_path, "BertForMaskedLM", v2=False)
    (tmp_path / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    torch.save({"bert": Attack(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="refused"):
        scfm.load(tmp_path)
    assert not marker.exists()


def test_a_vocabulary_of_another_length_is_an_error(tmp_path):
    save_bert(tmp_path, "BertForMaskedLM", v2=False)
    with pytest.raises(ModelFileError, match=r"62 tokens, but the vocabulary has 64"):
        scfm.load(tmp_path, vocabulary=published.tokens_of(N_GENES, v2=True))


@pytest.mark.parametrize("name", ["token_dictionary.json", "median_dictionary.json"])
def test_dictionaries_come_from_arguments_where_the_directory_has_none(tmp_path, name):
    save_bert(tmp_path / "model", "BertForMaskedLM", v2=False)
    shutil.move(tmp_path / "model" / name, tmp_path / name)
    argument = "vocabulary" if "token" in name else "medians"
    with pytest.raises(ModelFileError, match=f"{argument}="):
        scfm.load(tmp_path / "model")
    by_path = scfm.load(tmp_path / "model", **{argument: tmp_path / name})
    by_mapping = scfm.load(tmp_path / "model", **{argument: json.loads((tmp_path / name).read_text())})
    assert by_path.id == by_mapping.id
    np.testing.assert_array_equal(by_path.encoding.medians, by_mapping.encoding.medians)


def test_published_dictionaries_fit_the_published_presets(scfm_data):
    from scfm.encoding import read_vocabulary
    from scfm.families import preset

    for corpus, name in (("gc30M", "geneformer-v1-10m"), ("gc95M", "geneformer-v2-104m")):
        vocabulary = read_vocabulary(scfm_data / "vocab" / f"geneformer_token_dictionary_{corpus}.pkl")
        assert len(vocabulary) == preset(name).n_tokens
