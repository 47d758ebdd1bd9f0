"""Rates of a run: in the log and the progress bar, and what they are made of."""

import pandas as pd
import pytest
import torch

from scfm.train import FitConfig, train
from scfm.train.speed import Rates, Speed, block_flops, peak_tflops

CONFIG = FitConfig(n_steps=20, tokens_per_step=300, accelerator="cpu")


def test_the_log_holds_cells_and_tokens_per_second(tiny, tmp_path):
    train(tiny.network, tiny.masked, tiny.cells, CONFIG, title="t", run_dir=tmp_path, progress=False)
    log = pd.read_csv(tmp_path / "logs" / "metrics.csv")
    assert log["step"].tolist() == [9, 19]
    assert (log["cells_per_second"] > 0).all()
    lengths_B = tiny.cells.lengths_B
    assert (
        (log["tokens_per_second"] / log["cells_per_second"]).between(int(lengths_B.min()), int(lengths_B.max())).all()
    )
    assert "memory_gb" not in log  # of a GPU


def test_rates_count_every_batch_of_every_process(monkeypatch, tiny):
    """Two batches in two seconds on each of three processes."""
    from types import SimpleNamespace

    now = [10.0]
    monkeypatch.setattr("scfm.train.speed.time.perf_counter", lambda: now[0])
    speed = Speed(every=1)
    trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=1, max_steps=9, world_size=3, loggers=[])
    module = SimpleNamespace(device=torch.device("cpu"))
    speed.on_train_start(trainer, module)
    batch = tiny.cells.select(range(4)), {}
    speed.on_train_batch_end(trainer, module, None, batch, 0)
    assert speed.latest is None
    now[0] = 12.0
    speed.on_train_batch_end(trainer, module, None, batch, 1)
    assert speed.latest == Rates(cells=12.0, tokens=3.0 * batch[0].n_tokens)
    assert str(Rates(1200.4, 5e5, 0.314, 12.34)) == "1,200 cells/s, 500,000 tokens/s, 31% of peak, 12.3 GB"


def test_operations_of_a_step_are_counted_by_the_sizes(tiny):
    """2 blocks of width 32 with feed-forward 64: 4 x 32^2 + 2 x 32 x 64 numbers; forward once, backward twice."""
    cells = tiny.cells.select(range(5)).planned()
    matrices = 2 * (4 * 32**2 + 2 * 32 * 64)
    pairs = int((cells.lengths_B.long() ** 2).sum())
    assert block_flops(tiny.network, cells) == 3 * (2 * matrices * cells.n_tokens + 2 * 4 * 32 * pairs)
    context = cells.replace(n_known=(cells.lengths_B // 2).int()).planned()
    pairs = int((cells.lengths_B.long() * (cells.lengths_B // 2).long()).sum())
    assert block_flops(tiny.network, context) == 3 * (2 * matrices * cells.n_tokens + 2 * 4 * 32 * pairs)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-40GB", 311.8), ("Other", None)],
)
def test_the_peak_is_that_of_the_device(name, peak):
    assert peak_tflops(name) == peak
