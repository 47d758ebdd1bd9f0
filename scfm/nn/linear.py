"""A linear layer whose output rows are independent of each other."""

# Axes: N rows, D inputs, E outputs.

from __future__ import annotations

from torch import Tensor, nn

from scfm.ops.linear import linear


class Linear(nn.Linear):
    """A `torch.nn.Linear` whose output rows are bitwise independent of each other, at inference on the CPU.

    The embedding of a cell is then independent of the rest of the batch; see `scfm.ops.linear`. A ReLU and a residual can
    be computed in the same pass.
    """

    def forward(
        self,
        input: Tensor,  # noqa: A002 - the name of the parent class
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        return linear(input, self.weight, self.bias, relu=relu, residual_NE=residual)
