"""What each choice of trainable weights may change, for every family: bitwise, or by a matrix of low rank."""

import pytest
import torch

import scfm
from scfm.train import FitConfig, merge, set_trainable, train

RANK = 2


@pytest.fixture
def labeled(kind, cells_and_genes, small_model):
    """A network with a head for three classes, and labeled cells for it."""
    model = small_model(kind)
    cells = scfm.pp.encode(cells_and_genes, model)
    codes = cells_and_genes.obs["bulk_labels"].astype("category").cat.codes.to_numpy()
    model.network.add_class_head(int(codes.max()) + 1)
    return model.network, cells.replace(labels_B=torch.tensor(codes, dtype=torch.int64))


def fine_tune(network, cells, trainable):
    """Three large steps; returns the tensors before and after."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    config = FitConfig(n_steps=3, tokens_per_step=1024, learning_rate=1e-2, trainable=trainable)
    train(network, scfm.objectives.Classification(), cells, config, title="test", progress=False)
    after = network.state_dict()
    assert set(after) == set(before)
    return before, after


def n_blocks_read(network):
    """Geneformer's cell embedding, and so a class head on it, is of the second-to-last layer."""
    return 2 if network.config.pooling.hidden_layer == -2 else 3


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_head_leaves_every_other_tensor_bitwise_as_it_was(labeled):
    found = changed(*fine_tune(*labeled, "head"))
    assert "class_head.linear.weight" in found
    assert {name for name in found if not name.startswith("class_head.")} == set()


def test_last_blocks_leave_every_other_tensor_bitwise_as_it_was(labeled):
    found = changed(*fine_tune(*labeled, "last:1"))
    last = f"blocks.{n_blocks_read(labeled[0]) - 1}."
    assert {"class_head.linear.weight", f"{last}attention.qkv.weight", f"{last}feed_forward.up.weight"} <= found
    assert {name for name in found if not name.startswith(("class_head.", last))} == set()


def test_lora_changes_each_layer_by_a_matrix_of_its_rank(labeled):
    used = tuple(f"blocks.{number}." for number in range(n_blocks_read(labeled[0])))
    before, after = fine_tune(*labeled, f"lora:{RANK}")
    found = changed(before, after)
    layers = {name for name in before if name.startswith(used) and before[name].ndim == 2 and "projection" not in name}
    assert {name for name in found if not name.startswith("class_head.")} == layers
    for name in layers:
        singular_R = torch.linalg.svdvals(after[name].double() - before[name].double())
        rounding = torch.finfo(torch.float32).eps * before[name].abs().max() * max(before[name].shape)
        assert singular_R[0] > 100 * rounding, name
        assert (singular_R[RANK:] < rounding).all(), f"{name}: {singular_R[: RANK + 2].tolist()}"


def test_merging_keeps_the_logits(labeled):
    network, cells = labeled
    network.eval()
    with torch.no_grad():
        untouched_BC = network.class_logits(cells)
        set_trainable(network, f"lora:{RANK}")
        assert torch.allclose(network.class_logits(cells), untouched_BC, atol=1e-5)
        for name, parameter in network.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
        unmerged_BC = network.class_logits(cells)
        merge(network)
        merged_BC = network.class_logits(cells)
    assert (unmerged_BC - untouched_BC).abs().max() > 1e-2
    torch.testing.assert_close(merged_BC, unmerged_BC, rtol=1e-4, atol=1e-5)
