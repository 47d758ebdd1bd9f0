"""The last block at chosen tokens alone gives the states that it gives at all tokens, and their gradients."""

import pytest
import torch

from scfm.data import CellBatch
from scfm.models import CellTransformer, ModelConfig


def make_cells():
    lengths_B = torch.tensor([7, 1, 30, 12])
    generator = torch.Generator().manual_seed(0)
    return CellBatch(
        gene_ids_T=torch.randint(2, 50, (50,), generator=generator).int(),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)]).int(),
        values_T=torch.rand(50, generator=generator),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "pre", "final_norm": True},
        {"n_layers": 1},
        {"attention": {"kind": "linear"}},
        {"embedding": {"values": "continuous", "positions": "none"}},
    ],
)
@pytest.mark.parametrize("tokens", [[0, 3, 6, 9, 10, 37, 49], [12], [], list(range(50))])
def test_states_and_gradients_are_those_of_the_whole_network(changes, tokens):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 3, "d_ff": 48, "context_length": 64}
    network = CellTransformer(ModelConfig.from_dict({"n_tokens": 50, **sizes, **changes}), special_ids=(0, 1)).eval()
    token_N = torch.tensor(tokens, dtype=torch.int64)
    weigh_ND = torch.randn(len(tokens), 32)
    results = []
    for states_ND in (network.states_at(make_cells(), token_N), network(make_cells())[token_N]):
        network.zero_grad()
        (states_ND * weigh_ND).sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        results.append((states_ND.detach(), gradients))
    (states, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)
