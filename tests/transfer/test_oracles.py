"""Fine-tuning against published code: the same loss, gradients and weights after five steps.

Oracles: transformers' BERT classifiers (Geneformer V1 and V2) and the scGPT package's `TransformerModel`, which run on padded
batches with a mask. All weights are random and dropout is off. Weights are moved by plain gradient descent: AdamW divides by
the size of the gradient, which would amplify rounding where a gradient is zero in exact arithmetic (the bias of keys).
"""

import copy
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import scfm
from scfm.families import convert

FAMILIES = Path(__file__).parents[1] / "families"


def _of_families(name):
    spec = importlib.util.spec_from_file_location(f"models_{name}", FAMILIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published = _of_families("conftest")
ragged = published.ragged
N_CLASSES, N_STEPS, RATE = 3, 5, 0.02
# Deviation of what is added to every parameter: that of BERT's initialization. With 0.1 the attention of twelve layers saturates,
# and BERT's own gradients in float32 differ from those in float64 by 1e-3.
SCALE = 0.02
TOLERANCE = 1e-5  # relative to the largest element of the tensor
# The published proportions with small widths: V1 has 6 layers, heads of equal number, feed-forward of twice the width; V2 has
# 12 layers, 12 heads, and feed-forward of four times the width.
SHAPES = {
    "v1": {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128},
    "v2": {"hidden_size": 96, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 384},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def save_bert(folder, kind, version):
    transformers = pytest.importorskip("transformers")
    tokens = published.tokens_of(60, v2=version == "v2")
    config = published.bert_config(len(tokens), num_labels=N_CLASSES, **SHAPES[version], **NO_DROPOUT)
    config.id2label = {place: f"type {place}" for place in range(N_CLASSES)}
    torch.manual_seed(
        0
    )  # one set of weights in some tens has a ReLU whose input is zero within rounding, and which flips
    bert = published.shaken(getattr(transformers, kind)(config), scale=SCALE)
    bert.save_pretrained(folder)
    published.write_dictionaries(folder, tokens)
    return bert.train(), tokens


def cells_of(build, tokens):
    """Cells of 1 to 31 tokens; as V2 has it, between <cls> and <eos>."""
    cells = build(len(tokens))
    ids_T = cells.gene_ids_T.clone()
    if "<cls>" in tokens:
        lasts_B = cells.cu_seqlens[1:].long() - 1
        ids_T[lasts_B] = tokens["<eos>"]
        ids_T[cells.cu_seqlens[:-1].long()] = tokens["<cls>"]
    return cells.replace(gene_ids_T=ids_T, labels_B=torch.tensor([2, 0, 1, 0]))


def bert_inputs(cells):
    return {
        "input_ids": published.padded(cells.gene_ids_T.long(), cells),
        "attention_mask": published.padded(torch.ones(cells.n_tokens), cells),
    }


def our_loss(network, objective, cells):
    inputs, targets = objective.corrupt(cells, torch.Generator().manual_seed(0))
    return scfm.objectives.total(objective.loss(network, inputs, targets))


def in_published_form(model, tensors, folder, read):
    """Give tensors of our network (weights, or gradients in their place) the published names and layout."""
    holder = scfm.Model(copy.deepcopy(model.network), model.encoding, labels=model.labels)
    with torch.no_grad():
        for name, parameter in holder.network.named_parameters():
            parameter.copy_(tensors[name])
    folder.mkdir()
    holder.save(folder / "ours")
    convert(folder / "ours", folder / "theirs")
    return read(folder / "theirs")


def descend(network, loss_of):
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()


def gradients(network):
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in network.named_parameters()
    }


def assert_same(ours, theirs, scales):
    """Every tensor within `TOLERANCE` times its scale; none is missing and none is zero everywhere by accident."""
    assert set(theirs) <= set(ours)
    for name, expected in theirs.items():
        worst = (ours[name] - expected).abs().max().item()
        assert worst <= TOLERANCE * scales[name], f"{name}: {worst:.2e} of {scales[name]:.2e}"


def largest(tensors):
    """Largest element of each tensor; biases of queries, keys and values share theirs.

    The gradient of a key's bias is zero in exact arithmetic (softmax does not change with a constant), so it has no size of
    its own. The three are one tensor in our network, and in scGPT's.
    """
    sizes = {name: tensor.abs().max().item() for name, tensor in tensors.items()}
    for name in sizes:
        if ".attention.self." in name and name.endswith(".bias"):
            layer = name.split("attention.self.")[0]
            sizes[name] = max(sizes[f"{layer}attention.self.{part}.bias"] for part in ("query", "key", "value"))
    return sizes


def compare(model, objective, cells, theirs, their_loss, folder, read):
    """Loss and gradients at the start, and weights after `N_STEPS` steps of both."""
    network = model.network.train()
    ours, expected = our_loss(network, objective, cells), their_loss()
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=0)
    ours.backward()
    expected.backward()
    wanted = gradients(theirs)
    assert sum(bool(tensor.any()) for tensor in wanted.values()) > len(wanted) // 2
    assert_same(in_published_form(model, gradients(network), folder / "gradients", read), wanted, largest(wanted))

    before = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    descend(network, lambda: our_loss(network, objective, cells))
    descend(theirs, their_loss)
    after = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    scales = largest(after)
    steps = [((after[name] - before[name]).abs().max() / scales[name]).item() for name in after if wanted[name].any()]
    assert np.median(steps) > 100 * TOLERANCE  # else the weights would agree without a step
    weights = dict(network.named_parameters())
    assert_same(in_published_form(model, weights, folder / "weights", read), after, scales)


def read_bert(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_classifying_cells_moves_the_weights_as_bert_does(tmp_path, ragged, version):
    bert, tokens = save_bert(tmp_path / "model", "BertForSequenceClassification", version)
    cells, model = cells_of(ragged, tokens), scfm.load(tmp_path / "model")
    compare(
        model,
        scfm.objectives.Classification(),
        cells,
        bert,
        lambda: bert(**bert_inputs(cells), labels=cells.labels_B).loss,
        tmp_path,
        read_bert,
    )


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_classifying_genes_moves_the_weights_as_bert_does(tmp_path, ragged, version):
    bert, tokens = save_bert(tmp_path / "model", "BertForTokenClassification", version)
    cells, model = cells_of(ragged, tokens), scfm.load(tmp_path / "model")
    labels_V = torch.arange(len(tokens)) % (N_CLASSES + 1) - 1  # a quarter of the genes has no label
    labels_V[: len(tokens) - 60] = -1
    labels_BL = published.padded(labels_V[cells.gene_ids_T.long()], cells, fill=-1)
    ignored_BL = labels_BL.masked_fill(labels_BL < 0, -100)
    compare(
        model,
        scfm.objectives.GeneClassification(labels_V),
        cells,
        bert,
        lambda: bert(**bert_inputs(cells), labels=ignored_BL).loss,
        tmp_path,
        read_bert,
    )


def test_classifying_cells_moves_the_weights_as_scgpt_does(tmp_path, ragged):
    scgpt = _of_families("test_scgpt")
    peer = _scgpt_classifier(scgpt)
    scgpt.save(tmp_path / "model", peer.state_dict(), dropout=0.0)
    cells = scgpt.scgpt_cells(ragged).replace(labels_B=torch.tensor([2, 0, 1, 0]))
    ids_BL = published.padded(cells.gene_ids_T.long(), cells, fill=scgpt.TOKENS["<pad>"])
    values_BL = published.padded(cells.values_T, cells, fill=-2.0)

    def their_loss():
        answer = peer(ids_BL, values_BL, ids_BL == scgpt.TOKENS["<pad>"], CLS=True)
        return F.cross_entropy(answer["cls_output"], cells.labels_B)

    compare(
        scfm.load(tmp_path / "model"),
        scfm.objectives.Classification(),
        cells,
        peer,
        their_loss,
        tmp_path,
        lambda folder: torch.load(folder / "best_model.pt", weights_only=True),
    )


def _scgpt_classifier(scgpt):
    transformer_model = scgpt.published_class()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks on nested tensors
        peer = transformer_model(
            len(scgpt.TOKENS), 32, 4, 48, 3, n_cls=N_CLASSES, vocab=scgpt.TOKENS, pad_value=-2, dropout=0.0
        )
    return published.shaken(peer).train()
