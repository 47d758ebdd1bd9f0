"""What tools need from inside a block. Oracles: the block's own forward pass, and the cell without a token."""

import pytest
import torch

import scfm
from scfm import ops
from scfm.nn import Block
from scfm.nn.deletions import DeletionBlock
from scfm.nn.recording import record

LENGTHS = [7, 1, 12]


@pytest.fixture(params=["pre", "post"])
def block(request):
    torch.manual_seed(0)
    config = scfm.ModelConfig(n_tokens=10, d_model=16, n_heads=2, n_layers=1, d_ff=24, norm=request.param)
    return Block(config).double().eval()


@pytest.fixture
def hidden():
    return torch.randn(sum(LENGTHS), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plan():
    return ops.make_plan(torch.tensor([0, *LENGTHS]).cumsum(0).int())


@torch.no_grad()
def test_parts_of_a_block_add_up_to_its_forward_pass(block, hidden, plan):
    query, key, value = block.project(hidden)
    expected = block(hidden, plan)
    torch.testing.assert_close(block.with_keys(hidden, key, value, plan), expected, rtol=0, atol=0)
    attended = block.attention.attend(query, key, value, plan)
    torch.testing.assert_close(block.after_attention(hidden, attended), expected, rtol=0, atol=0)


def test_a_recording_holds_the_states_of_every_block_and_ends_with_its_block(block, hidden, plan):
    with record([block]) as recording:
        first = block(hidden, plan)
        block(first, plan)
    block(hidden, plan)
    assert len(recording.attention) == 2
    states = recording.attention[0]
    for part, expected in zip(states[:3], block.project(hidden)):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    gradient = torch.autograd.grad(first.sum(), states.attended_TX)[0]
    assert gradient.shape == states.attended_TX.shape
    assert gradient.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("moves", [True, False])
def test_shared_deletions_are_the_block_on_each_cell_without_a_token(block, moves):
    generator = torch.Generator().manual_seed(2)
    stays = torch.randn(9, 16, dtype=torch.float64, generator=generator)
    moved = torch.randn(9, 16, dtype=torch.float64, generator=generator) if moves else stays
    for run in (range(1), range(2, 6), range(5, 9)):
        found = DeletionBlock(block, stays, moved).run(run).view(len(run), 8, 16)
        for output, index in zip(found, run):
            cell = torch.cat([stays[:index], moved[index + 1 :]])
            expected = block(cell, ops.make_plan(torch.tensor([0, 8], dtype=torch.int32)))
            # Scores of the run are in float32, as those of the kernels.
            torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
