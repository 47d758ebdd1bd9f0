"""Cross-entropy in parts is torch's cross-entropy on all logits at once, in value and gradients."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from scfm.objectives import cross_entropy
from scfm.objectives.cross_entropy import linear_cross_entropy


def problem(n_rows=70, width=12, n_classes=90, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        (scale * torch.randn(shape, generator=generator)).requires_grad_()
        for shape in ((n_rows, width), (n_classes, width), (n_classes,))
    )
    return hidden, weight, bias, torch.randint(n_classes, (n_rows,), generator=generator)


def gradients(loss, leaves):
    return torch.autograd.grad(loss / 7.0, leaves)  # a factor, as the mean over targets has one


@pytest.mark.parametrize("rows", [1, 32, 70, 512])
def test_value_and_gradients_are_those_of_torch(monkeypatch, rows):
    monkeypatch.setattr(cross_entropy, "ROWS_AT_A_TIME", rows)
    *leaves, target = problem()
    expected = F.cross_entropy(F.linear(*leaves), target, reduction="sum")
    got = linear_cross_entropy(*leaves, target)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(gradients(got, leaves), gradients(expected, leaves)):
        torch.testing.assert_close(ours, theirs)


def test_huge_logits_neither_overflow_nor_lose_the_target():
    *leaves, target = problem(scale=30.0)
    got = linear_cross_entropy(*leaves, target)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(*leaves), target, reduction="sum"))
    assert all(gradient.isfinite().all() for gradient in gradients(got, leaves))


def test_autocast_is_at_most_twice_as_far_off_as_torch_in_autocast():
    *leaves, target = problem(n_rows=300, width=64, n_classes=500, scale=0.3)
    exact = F.cross_entropy(F.linear(*leaves), target, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.cross_entropy(F.linear(*leaves).float(), target, reduction="sum")
        ours = linear_cross_entropy(*leaves, target)
    assert abs(ours - exact) <= 2 * abs(theirs - exact) + 1e-3 * abs(exact)
    for mine, torchs, true in zip(*(gradients(loss, leaves) for loss in (ours, theirs, exact))):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() <= 2 * (torchs - true).norm()


def test_no_bfloat16_matrices_are_multiplied_where_that_is_slow(monkeypatch):
    class DtypesOfProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().split(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_"):
                seen.update(each.dtype for each in args if isinstance(each, torch.Tensor))
            return func(*args, **(kwargs or {}))

    seen: set[torch.dtype] = set()
    *leaves, target = problem()
    for slow in (True, False):
        monkeypatch.setattr(cross_entropy, "has_slow_bfloat16", lambda slow=slow: slow)
        with torch.autocast("cpu", torch.bfloat16), DtypesOfProducts():
            seen.clear()
            loss = linear_cross_entropy(*leaves, target)
        assert seen == ({torch.float32} if slow else {torch.bfloat16})
        assert [each.dtype for each in gradients(loss, leaves)] == [torch.float32] * 3


def test_without_gradients_only_the_loss_is_made():
    *leaves, target = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(*leaves, target)
    torch.testing.assert_close(loss, linear_cross_entropy(*leaves, target).detach())


def test_no_rows_cost_nothing():
    hidden, weight, bias, target = problem(n_rows=0)
    loss = linear_cross_entropy(hidden, weight, bias, target)
    assert float(loss.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(loss, (hidden, weight, bias)))


def test_fewer_bytes_are_kept_than_the_logits_hold():
    *leaves, target = problem(n_rows=2000, width=8, n_classes=3000)
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        linear_cross_entropy(*leaves, target)
    assert sum(kept.values()) < 0.02 * 2000 * 3000 * 4


def test_a_second_backward_pass_is_refused_not_wrong():
    *leaves, target = problem()
    loss = linear_cross_entropy(*leaves, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
