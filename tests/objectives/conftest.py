"""A small value encoding: four cells that start with <cls>, and a network that reads them."""

import numpy as np
import pytest
import torch

from scfm.data import CellBatch
from scfm.families import merged, scgpt
from scfm.models import CellTransformer, ModelConfig

N_TOKENS, CLS, LENGTHS = 40, 2, (9, 30, 2, 17)


def scgpt_cells():
    rng = np.random.default_rng(0)
    ids = np.concatenate([[CLS, *rng.permutation(np.arange(4, N_TOKENS))[: length - 1]] for length in LENGTHS])
    values = rng.integers(0, 6, len(ids)).astype(np.float32)
    starts = np.cumsum([0, *LENGTHS])
    values[starts[:-1]] = -2
    return CellBatch(
        gene_ids_T=torch.from_numpy(ids.astype(np.int32)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        values_T=torch.from_numpy(values),
        batch_ids_B=torch.tensor([0, 1, 1, 2]),
    )


@pytest.fixture
def cells():
    return scgpt_cells()


@pytest.fixture
def is_gene_V():
    mask = torch.ones(N_TOKENS, dtype=torch.bool)
    mask[:4] = False
    return mask


@pytest.fixture
def make_network():
    def make(**changes):
        torch.manual_seed(0)
        sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "dropout": 0.0, "context_length": 64}
        network = CellTransformer(
            ModelConfig.from_dict(merged(scgpt.ARCHITECTURE, sizes, {"n_tokens": N_TOKENS}, changes)),
            special_ids=(0, 1, 2, 3),
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return network

    return make


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)
