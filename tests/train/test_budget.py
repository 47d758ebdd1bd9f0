"""The token budget: what a token costs is counted, and the budget keeps within memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scfm.train import FitConfig, train
from scfm.train.budget import choose_tokens_per_step, saved_bytes

CPU = torch.device("cpu")


def test_the_cost_grows_with_the_tokens(tiny):
    few, many = tiny.cells.select(range(20)), tiny.cells.select(range(120))
    ratio = saved_bytes(tiny.network, tiny.classify, many) / saved_bytes(tiny.network, tiny.classify, few)
    assert ratio == pytest.approx(many.n_tokens / few.n_tokens, rel=0.2)


def test_what_is_kept_is_counted_once(tiny):
    """Oracle: the square of a matrix keeps that matrix, and nothing else."""

    class Square:
        def corrupt(self, cells, generator):
            return cells, {}

        def loss(self, network, inputs, targets):
            from scfm.objectives import Term

            kept = torch.ones(100, 50, requires_grad=True) * 1.0
            return {"square": Term((kept * kept).sum(), torch.tensor(1.0))}

    cost = saved_bytes(tiny.network, Square(), tiny.make_cells(4))
    assert 100 * 50 * 4 <= cost < 100 * 50 * 4 + 500  # the loss's own scalars are a few bytes


@pytest.mark.parametrize("memory", [2_000_000, 20_000_000])
def test_the_budget_keeps_within_half_of_the_memory(tiny, memory):
    budget = choose_tokens_per_step(tiny.network, tiny.classify, tiny.cells, device=CPU, memory=memory)
    per_token = saved_bytes(tiny.network, tiny.classify, tiny.cells) / tiny.cells.n_tokens
    assert budget * per_token < 0.5 * memory * 1.2
    assert 2 * budget * per_token > 0.5 * memory * 0.8


def test_the_longest_cell_always_fits_and_training_takes_the_budget(tiny):
    assert choose_tokens_per_step(tiny.network, tiny.classify, tiny.cells, device=CPU, memory=1) == int(
        tiny.cells.lengths_B.max()
    )
    module = train(
        tiny.network, tiny.classify, tiny.cells, FitConfig(n_steps=2, tokens_per_step=None), title="t", progress=False
    )
    assert module.config.tokens_per_step == 16_384


RAGGED = """
import resource, sys
sys.path.insert(0, {tests!r})
import lightning, torch
from conftest import make_network
from scfm.data import CellBatch
from scfm.objectives import MaskedGenes
from scfm.train import FitConfig, train

lengths_B = torch.randint(1, 1000, (2000,), generator=torch.Generator().manual_seed(0)) ** 2 // 1000 + 1
cells = CellBatch(
    gene_ids_T=torch.randint(2, 40, (int(lengths_B.sum()),)).int(),
    cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)]),
)
peaks = []

class Peak(lightning.Callback):
    def on_train_batch_end(self, *_):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

network = make_network(context_length=1024)
config = FitConfig(n_steps=500, tokens_per_step=2048, accelerator="cpu")
train(network, MaskedGenes(mask_id=1, is_gene_V=network.is_gene_V), cells, config, title="t", progress=False, callbacks=[Peak()])
print(peaks[50], peaks[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
def test_peak_memory_stays_flat_over_five_hundred_ragged_steps():
    script = RAGGED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    early, late = map(int, done.stdout.split()[-2:])
    assert late <= 1.1 * early
