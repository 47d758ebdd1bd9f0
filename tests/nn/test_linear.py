"""Rows of a linear layer do not depend on each other, and are those of torch."""

import pytest
import torch
from torch.nn import functional as F

from scfm.nn import Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_in_any_company(dtype, bias):
    torch.manual_seed(0)
    layer = Linear(256, 96, bias=bias).to(dtype)
    rows_ND = torch.randn(2500, 256).to(dtype)
    with torch.inference_mode():
        whole_NE = layer(rows_ND)
        for start, stop in ((0, 1), (3, 20), (100, 700), (2047, 2049), (2499, 2500)):
            assert torch.equal(layer(rows_ND[start:stop].clone()), whole_NE[start:stop])
        shuffled = torch.randperm(2500)
        assert torch.equal(layer(rows_ND[shuffled]), whole_NE[shuffled])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [0, 1, 512, 2048, 3000])
def test_values_are_those_of_torch(dtype, n_rows):
    torch.manual_seed(0)
    layer = Linear(64, 32).to(dtype)
    rows_ND = torch.randn(n_rows, 64).to(dtype)
    with torch.inference_mode():
        expected_NE = F.linear(rows_ND.float(), layer.weight.float(), layer.bias.float())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(layer(rows_ND).float(), expected_NE, rtol=tolerance, atol=tolerance)


def test_autocast_computes_in_its_dtype():
    layer, rows_ND = Linear(16, 8), torch.randn(5, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(rows_ND).dtype == torch.bfloat16


def test_gradients_flow_in_training():
    layer, rows_ND = Linear(16, 8), torch.randn(5, 16)
    layer(rows_ND).sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows_ND.sum(0).expand(8, 16))
