"""Loss and gradient of rows of logits: the values of float64, in an order of sums that no thread and no other row changes."""

# Axes: N rows, V classes.

import sys

import accuracy
import pytest
import torch
from torch.nn import functional as F

from scfm import ops
from scfm.ops.cross_entropy import cross_entropy_gradient

NEEDS_KERNELS = pytest.mark.skipif(not ops.extension_info()["available"], reason="needs the compiled extension")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (2, 31), (16, 64), (33, 3000), (0, 5)]


def draw(n_rows, n_classes, dtype=torch.float32, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed + n_rows + n_classes)
    logits_NV = (scale * torch.randn(n_rows, n_classes, generator=generator)).to(dtype)
    bias_V = torch.randn(n_classes, generator=generator)
    return logits_NV, bias_V, torch.randint(n_classes, (n_rows,), generator=generator)


def by_autograd(logits_NV, bias_V, target_N, dtype):
    scores_NV = (logits_NV.to(dtype) + bias_V.to(dtype)).requires_grad_()
    loss_N = F.cross_entropy(scores_NV, target_N, reduction="none")
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), scores_NV)
    return loss_N.detach(), grad_NV, grad_NV.sum(0)


def check_accuracy(n_rows, n_classes, dtype):
    draws = [draw(n_rows, n_classes, dtype, seed=seed) for seed in range(4)]
    found = []
    for logits_NV, bias_V, target_N in draws:
        grad_NV = logits_NV.clone()
        loss_N, grad_V = cross_entropy_gradient(grad_NV, bias_V, target_N)
        found.append((loss_N, grad_NV, grad_V))
    plain, exact = ([by_autograd(*one, kind) for one in draws] for kind in (torch.float32, torch.float64))
    for part in range(3):
        ours, theirs, truth = ([one[part] for one in results] for results in (found, plain, exact))
        if ours[0].numel():
            theirs = [one.to(of.dtype) for one, of in zip(theirs, ours)]
            accuracy.check(
                ours, truth, accuracy.root_mean_square_error(theirs, truth), (part, n_rows, n_classes, dtype)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_within_twice_those_of_torch(shape, dtype):
    check_accuracy(*shape, dtype)


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", accuracy.ISAS)
def test_every_instruction_set(isa):
    """In a separate process, with torch limited to the same instruction set."""
    accuracy.run_with(isa, __file__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_bitwise_independent_of_the_others_and_of_threads(dtype):
    logits_NV, bias_V, target_N = draw(100, 1000, dtype)
    grad_NV = logits_NV.clone()
    loss_N, grad_V = cross_entropy_gradient(grad_NV, bias_V, target_N)
    for rows in (slice(0, 1), slice(17, 60), slice(99, 100)):
        part_NV = logits_NV[rows].clone()
        part_N, _ = cross_entropy_gradient(part_NV, bias_V, target_N[rows])
        assert torch.equal(part_N, loss_N[rows])
        assert torch.equal(part_NV, grad_NV[rows])
    torch.set_num_threads(3 - min(torch.get_num_threads(), 2))
    again_NV = logits_NV.clone()
    again_N, again_V = cross_entropy_gradient(again_NV, bias_V, target_N)
    assert torch.equal(again_N, loss_N)
    assert torch.equal(again_NV, grad_NV)
    assert torch.equal(again_V, grad_V)


def test_logits_may_have_longer_rows_in_memory():
    logits_NV, bias_V, target_N = draw(20, 70)
    wide_NX = torch.full((20, 96), 7.0)
    wide_NX[:, :70] = logits_NV
    results = cross_entropy_gradient(wide_NX[:, :70], bias_V, target_N)
    expected = cross_entropy_gradient(logits_NV, bias_V, target_N)
    assert torch.equal(wide_NX[:, :70], logits_NV)
    assert (wide_NX[:, 70:] == 7.0).all()
    assert all(torch.equal(one, other) for one, other in zip(results, expected))


def test_without_a_bias_nothing_is_added():
    logits_NV, bias_V, target_N = draw(20, 70)
    other_NV = logits_NV.clone()
    found = cross_entropy_gradient(logits_NV, None, target_N)
    expected = cross_entropy_gradient(other_NV, torch.zeros_like(bias_V), target_N)
    assert torch.equal(logits_NV, other_NV)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_far_logits_neither_overflow_nor_lose_the_target():
    logits_NV, bias_V, target_N = draw(8, 200, scale=1e4)
    expected = by_autograd(logits_NV, torch.zeros_like(bias_V), target_N, torch.float64)
    loss_N, _ = cross_entropy_gradient(logits_NV, None, target_N)
    torch.testing.assert_close(loss_N.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits_NV.double(), expected[1], rtol=0, atol=1e-6)


def test_one_nan_makes_the_loss_of_its_row_nan():
    logits_NV, bias_V, target_N = draw(5, 50)
    logits_NV[3, 20] = torch.nan
    loss_N, _ = cross_entropy_gradient(logits_NV, bias_V, target_N)
    assert loss_N.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_that_is_no_class_is_an_error(target):
    logits_NV, bias_V, target_N = draw(5, 50)
    target_N[2] = target
    with pytest.raises((RuntimeError, IndexError), match=r"out of bounds|`target` is"):
        cross_entropy_gradient(logits_NV, bias_V, target_N)


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(5, 50).T, "`logits` must be a matrix"),
        (0, torch.zeros(5, 50).double(), "must hold float32"),
        (1, torch.zeros(50).double(), r"`bias` must be \(50\)"),
        (2, torch.zeros(5, dtype=torch.int32), r"`target` must be \(5\)"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(position, wrong, message):
    arguments = list(draw(5, 50))
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.scfm.cross_entropy_gradient(*arguments)


@NEEDS_KERNELS
def test_opcheck():
    logits_NV, bias_V, target_N = draw(9, 20)
    torch.library.opcheck(torch.ops.scfm.cross_entropy_gradient.default, (logits_NV, bias_V, target_N))
    torch.library.opcheck(torch.ops.scfm.cross_entropy_gradient.default, (logits_NV, None, target_N))


if __name__ == "__main__":
    for kind in DTYPES:
        for sizes in SHAPES:
            check_accuracy(*sizes, kind)
    sys.stdout.write(str(ops.extension_info()["isa"]))
