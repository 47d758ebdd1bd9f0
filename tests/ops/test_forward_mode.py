"""Forward-mode differentiation is right or refused; a tangent is never silently zero."""

# Axes: T packed tokens, H heads, K head width.

import pytest
import torch

from scfm import ops
from scfm.nn.dropout import add_dropped
from scfm.ops.linear import linear

HAS_KERNELS = ops.extension_info()["available"]
BACKENDS = ["torch", pytest.param("fused", marks=pytest.mark.skipif(not HAS_KERNELS, reason="needs the extension"))]
BOUNDS = torch.tensor([0, 2, 6])


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


Q, K, V = draw(3, 6, 2, 8)
REFUSED = {
    "attention of queries": lambda x, backend: ops.attention(x, K, V, BOUNDS, backend=backend),
    "attention of keys": lambda x, backend: ops.attention(Q, x, V, BOUNDS, backend=backend, return_lse=True)[1],
    "attention of values": lambda x, backend: ops.attention(Q, K, x, BOUNDS, backend=backend),
    "attention of a bias": lambda x, backend: ops.attention(Q, K, V, BOUNDS, key_bias=x[..., 0], backend=backend),
    "scores": lambda x, backend: ops.attention_scores(x, K, BOUNDS, backend=backend),
    "effects": lambda x, backend: ops.deletion_effects(Q, K, V, BOUNDS, x, backend=backend),
    "kernels of linear attention": lambda x, backend: ops.linear_attention(
        x, K, V, BOUNDS, torch.ones(4, 8), backend="fused"
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_rule_is_refused(function, backend):
    for transform in (torch.func.jvp, lambda f, x, t: torch.func.jacfwd(f)(*x)):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward mode|compiled extension"):
            transform(lambda x: function(x, backend), (Q,), (Q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        function(torch.autograd.forward_ad.make_dual(Q, Q), backend)


@pytest.mark.parametrize("position", range(3))
def test_linear_attention_pushes_forward_what_it_pulls_back(position):
    """The product of cotangent and tangent by forward mode is that by reverse mode."""
    tangent, cotangent, projection = draw(2, 6, 2, 8)[0], draw(3, 6, 2, 8)[2], draw(12, 8)

    def function(x):
        tensors = [Q, K, V]
        tensors[position] = x
        return ops.linear_attention(*tensors, BOUNDS, projection)

    x = (Q, K, V)[position].clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x), x, cotangent)
    forward = torch.func.jvp(function, (x.detach(),), (tangent,))[1]
    assert forward.abs().max() > 0.01
    torch.testing.assert_close((forward * cotangent).sum(), (grad * tangent).sum())


@pytest.mark.parametrize("is_training", [True, False])
def test_linear_without_gradients_has_tangents(is_training):
    rows, weight, tangent = draw(3, 16), draw(5, 16), draw(2, 3, 16)[1]

    def function(x):
        with torch.set_grad_enabled(is_training):
            return linear(x, weight, residual_NE=x[:, :5])

    found = torch.func.jvp(function, (rows,), (tangent,))[1]
    torch.testing.assert_close(found, tangent @ weight.T + tangent[:, :5])


def test_dropout_is_refused_and_not_differentiated_to_zero():
    x = draw(4, 8)
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.jvp(lambda x: add_dropped(x, x, 0.5, True), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD"):
        add_dropped(x, torch.autograd.forward_ad.make_dual(x, x), 0.5, True)
