"""The token budget: fixed on a CPU, measured on a GPU, and kept in every batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scfm.train import FitConfig, budget, train
from scfm.train.budget import choose_tokens_per_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MEASURED = FitConfig(tokens_per_step=None)


class PretendedSteps:
    """A device on which a token takes so many bytes, and steps above a size fail."""

    def __init__(self, per_token, largest):
        self.per_token, self.largest, self.tried = per_token, largest, []

    def __call__(self, *_):
        return self

    def bytes_per_token(self):
        return self.per_token

    def fits(self, n_tokens):
        self.tried.append(n_tokens)
        return n_tokens <= self.largest


def chosen(tiny, monkeypatch, *, memory, per_token=1000, largest=10**9):
    steps = PretendedSteps(per_token, largest)
    monkeypatch.setattr(budget, "_Trial", steps)
    monkeypatch.setattr(budget, "free_memory", lambda device: memory)
    return choose_tokens_per_step(tiny.network, tiny.masked, tiny.cells, MEASURED, device=GPU), steps.tried


def test_a_cpu_has_a_fixed_budget(tiny):
    assert choose_tokens_per_step(tiny.network, tiny.masked, tiny.cells, MEASURED, device=CPU) == 8192
    config = MEASURED.replace(n_steps=2, accelerator="cpu")
    module = train(tiny.network, tiny.classify, tiny.cells, config, title="t", progress=False)
    assert module.config.tokens_per_step == 8192


@pytest.mark.parametrize(("memory", "expected"), [(2**20 * 1000, 2**19), (2**10 * 1000, 2**9), (10**15, 262_144)])
def test_a_gpu_has_the_largest_power_of_two_that_half_of_its_memory_holds(tiny, monkeypatch, memory, expected):
    assert chosen(tiny, monkeypatch, memory=memory)[0] == min(expected, 262_144)


def test_a_budget_that_does_not_fit_after_all_is_halved(tiny, monkeypatch):
    found, tried = chosen(tiny, monkeypatch, memory=2**15 * 1000, largest=5000)
    assert (found, tried) == (4096, [16_384, 8192, 4096])


def test_a_measurement_that_does_not_fit_starts_small(tiny, monkeypatch):
    def too_large(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PretendedSteps, "bytes_per_token", too_large)
    assert chosen(tiny, monkeypatch, memory=10**12, largest=1500) == (1024, [2048, 1024])


def test_the_longest_cell_always_fits(tiny, monkeypatch):
    longest = int(tiny.cells.lengths_B.max())
    assert chosen(tiny, monkeypatch, memory=1)[0] == longest
    assert chosen(tiny, monkeypatch, memory=2**15 * 1000, largest=0)[0] == longest


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"precision": "32-true"}, {"activation_checkpointing": True}])
def test_a_measured_budget_trains_within_the_memory_of_a_gpu(tiny, changes):
    config = FitConfig(n_steps=2, tokens_per_step=None, **changes)
    module = train(tiny.network, tiny.masked, tiny.cells, config, title="t", progress=False)
    assert module.config.tokens_per_step > 8192


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
