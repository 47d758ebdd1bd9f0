"""The id and the bfloat16 network follow every change of the weights, also those that torch does not count."""

import copy
import pickle

import numpy as np
import pytest
import torch

import scfm
from scfm.models import identity


@pytest.fixture
def model():
    vocabulary = scfm.Vocabulary.from_genes([f"G{n}" for n in range(600)], special=("pad", "mask", "cls"))
    encoding = scfm.encoding.make_encoding("bin", vocabulary=vocabulary)
    torch.manual_seed(0)
    config = scfm.ModelConfig(n_tokens=len(vocabulary), d_model=32, n_heads=2, n_layers=2)
    return scfm.Model(scfm.models.CellTransformer.for_vocabulary(config, vocabulary), encoding)


@pytest.fixture
def cells(model):
    rng = np.random.default_rng(0)
    counts = scfm.data.CountSource(rng.poisson(1.0, (4, 600)), var=None)
    genes = scfm.encoding.GeneMap.from_names(model.encoding.vocabulary.genes, model.encoding.vocabulary)
    return model.encoding.encode(counts.rows(0, 4), genes)


def weight(model):
    return model.network.blocks[0].attention.qkv.weight


def step(model):
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=0.1)
    weight(model).square().sum().backward()
    optimizer.step()


def load(model):
    model.network.load_state_dict({name: tensor + 1 for name, tensor in model.network.state_dict().items()})


def by_numpy(model):
    weight(model).detach().numpy()[0, 0] += 1


EDITS = {
    "a training step": step,
    "load_state_dict": load,
    "an edit in place": lambda model: weight(model).detach().mul_(2),
    "an edit of .data": lambda model: weight(model).data[3].mul_(2),
    "new .data": lambda model: setattr(weight(model), "data", weight(model).data * 2),
    "NumPy": by_numpy,
    "rows of the table of genes are exchanged": lambda model: model.network.embedding.gene.weight.data.copy_(
        model.network.embedding.gene.weight.data.flip(0)
    ),
    "a new parameter": lambda model: setattr(
        model.network.blocks[0].attention.qkv, "weight", torch.nn.Parameter(weight(model).detach() * 2)
    ),
    "to bfloat16 and back": lambda model: model.network.bfloat16().float(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_the_id_and_bfloat16_follow_an_edit(model, cells, edit):
    first, embedding_BD = model.id, model.embed(cells, precision="bf16")
    assert model.id == first
    edit(model)
    fresh = scfm.Model(copy.deepcopy(model.network), model.encoding)
    assert model.id == fresh.id != first
    changed_BD = model.embed(cells, precision="bf16")
    assert np.array_equal(changed_BD, fresh.embed(cells, precision="bf16"))
    assert not np.array_equal(changed_BD, embedding_BD)


def test_the_id_follows_settings_and_labels(model):
    first = model.id
    model.labels = ("a", "b")
    assert model.id != first
    model.labels = ()
    assert model.id == first
    model.network.config = model.network.config.replace(pooling={"how": "max"})
    assert model.id != first


def test_the_id_is_hashed_once_and_copies_carry_nothing(model, monkeypatch):
    first, hashed = model.id, []
    monkeypatch.setattr(identity, "_hashed", lambda *given: hashed.append(given) or "other")
    assert model.id == model.id == first
    assert not hashed
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(copied).keys() == vars(model).keys()
        assert copied.id == "other"


def test_the_network_in_bfloat16_shares_what_is_not_converted(model, cells):
    size = len(pickle.dumps(model))
    half = model.network_in("bf16")
    assert half.embedding is model.network.embedding
    assert {parameter.dtype for parameter in half.blocks.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    assert len(pickle.dumps(model)) == size
    expected = copy.deepcopy(model.network).eval()
    expected.blocks.bfloat16()
    expected.norm.bfloat16()
    with torch.no_grad():
        assert torch.equal(half.embed_cells(cells), expected.embed_cells(cells))
