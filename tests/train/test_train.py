"""Training: it learns, it repeats itself, it resumes to the same bits, it stops cleanly, it says what went wrong."""

import copy
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning
import pandas as pd
import pytest
import torch

from scfm.data import CellBatch
from scfm.errors import ModelFileError, OutputError
from scfm.families import scgpt
from scfm.objectives import Generative
from scfm.train import FitConfig, NonFiniteLossError, callbacks, merge, set_trainable, train, trainable
from scfm.train.checkpoints import Resumption, read_checkpoint
from scfm.train.module import parameter_groups
from scfm.train.plugins import AtomicCheckpointIO
from scfm.train.precision import resolved_precision

CONFIG = FitConfig(n_steps=12, tokens_per_step=400, learning_rate=3e-3, checkpoint_every=4, accelerator="cpu")


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss(tiny):
    losses = train(
        tiny.network, tiny.classify, tiny.cells, CONFIG.replace(n_steps=30), title="t", progress=False
    ).losses
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_same_seed_same_weights_and_another_seed_others(tiny):
    runs = []
    for seed in (0, 0, 1):
        network = tiny.make_network(classes={"n_classes": 3})
        train(network, tiny.masked, tiny.cells, CONFIG.replace(seed=seed), title="t", progress=False)
        runs.append(weights(network))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_mixed_precision_learns_as_full_precision_does(tiny):
    last = {}
    for precision in ("32-true", "bf16-mixed"):
        network = tiny.make_network(classes={"n_classes": 3})
        module = train(
            network,
            tiny.classify,
            tiny.cells,
            CONFIG.replace(n_steps=30, precision=precision),
            title="t",
            progress=False,
        )
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
        last[precision] = float(torch.stack(module.losses[-5:]).mean())
    assert last["bf16-mixed"] == pytest.approx(last["32-true"], rel=0.1)
    assert last["bf16-mixed"] < 0.6


def test_training_leaves_the_callers_random_state_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tiny.network, tiny.masked, tiny.cells, CONFIG.replace(n_steps=2), title="t", progress=False)
    assert torch.equal(torch.rand(3), expected)


class StopAt(lightning.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_broken_run_resumes_to_the_same_bits(tiny, tmp_path, accumulate):
    config = CONFIG.replace(accumulate=accumulate)
    whole = tiny.make_network(classes={"n_classes": 3})
    expected = train(whole, tiny.masked, tiny.cells, config, title="t", run_dir=tmp_path / "whole", progress=False)
    broken = tiny.make_network(classes={"n_classes": 3})
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, tiny.masked, tiny.cells, config, title="t", run_dir=tmp_path / "broken", progress=False,
              callbacks=[StopAt(10)])  # fmt: skip
    resumed = tiny.make_network(seed=9, classes={"n_classes": 3})  # other weights: all must come from the checkpoint
    got = train(resumed, tiny.masked, tiny.cells, config, title="t", run_dir=tmp_path / "broken", progress=False)
    assert same(weights(whole), weights(resumed))
    assert torch.equal(torch.stack(expected.losses), torch.stack(got.losses))


def test_the_objective_changes_at_its_step_also_in_a_resumed_run(tiny, tmp_path):
    """Generative training whose second pass comes at step 6, broken at 10: the same losses as in one go."""
    config = CONFIG.replace(checkpoint_every=4)
    architecture = {**scgpt.ARCHITECTURE, "pooling": {"how": "mean"}}
    cells = tiny.cells.replace(values_T=(tiny.cells.gene_ids_T % 7).float())

    def run(name, *callbacks):
        network = tiny.make_network(**architecture)
        objective = Generative(is_gene_V=network.is_gene_V, second_pass_from=6)
        module = train(network, objective, cells, config, title="t", run_dir=tmp_path / name, progress=False,
                       callbacks=callbacks)  # fmt: skip
        return torch.stack(module.losses), weights(network)

    whole = run("whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run("broken", StopAt(10))
    resumed = run("broken")
    assert torch.equal(whole[0], resumed[0])
    assert same(whole[1], resumed[1])
    without = tiny.make_network(**architecture)
    one_pass = train(without, Generative(is_gene_V=without.is_gene_V), cells, config, title="t", progress=False)
    agree = [bool(torch.equal(a, b)) for a, b in zip(whole[0], one_pass.losses)]
    assert agree == [True] * 6 + [False] * 6


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from conftest import make_cells, make_network
import lightning, torch
from scfm.objectives import MaskedGenes
from scfm.train import FitConfig, train

torch.set_num_threads({threads})  # the promise holds for one and the same number

class Slow(lightning.Callback):
    def on_train_batch_end(self, *_):
        time.sleep(0.1)

network = make_network(classes={{"n_classes": 3}})
train(network, MaskedGenes(mask_id=1, is_gene_V=network.is_gene_V), make_cells(), FitConfig(**{config!r}),
      title="t", run_dir={run!r}, progress=False, callbacks=[Slow()])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tiny, tmp_path):
    config = CONFIG.replace(n_steps=60)
    script = KILLED.format(tests=str(Path(__file__).parent), config=config.to_dict(), run=str(tmp_path / "run"),
                           threads=torch.get_num_threads())  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.time() + 120
    while Resumption.newest(tmp_path / "run") is None and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.35)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    step = Resumption.newest(tmp_path / "run").step
    assert 4 <= step < 60
    resumed, whole = tiny.make_network(seed=9, classes={"n_classes": 3}), tiny.make_network(classes={"n_classes": 3})
    train(resumed, tiny.masked, tiny.cells, config, title="t", run_dir=tmp_path / "run", progress=False)
    train(whole, tiny.masked, tiny.cells, config, title="t", progress=False)
    assert same(weights(whole), weights(resumed))


def test_the_log_holds_loss_terms_and_rate_also_of_a_resumed_run(tiny, tmp_path):
    config = CONFIG.replace(n_steps=40, checkpoint_every=20)
    cells = tiny.cells.replace(values_T=(tiny.cells.gene_ids_T % 7).float())

    def run(*callbacks):
        network = tiny.make_network(**{**scgpt.ARCHITECTURE, "pooling": {"how": "mean"}})
        return train(network, Generative(is_gene_V=network.is_gene_V), cells, config, title="t", run_dir=tmp_path,
                     progress=False, callbacks=callbacks)  # fmt: skip

    with pytest.raises(RuntimeError, match="power cut"):
        run(StopAt(31))
    module = run()
    first, second = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("logs", "logs_from_20"))
    assert first["step"].tolist() == [9, 19, 29]
    assert second["step"].tolist() == [29, 39]
    for log in (first, second):
        expected = [float(module.losses[step]) for step in log["step"]]
        assert log["loss"].tolist() == pytest.approx(expected)
        assert (log["loss_gep"] + log["loss_mvc"]).tolist() == pytest.approx(expected)
        assert log["learning_rate"].tolist() == pytest.approx(
            [module.config.learning_rate * module.rate_at(step) for step in log["step"]]
        )


def test_tensorboard_gets_the_losses_where_it_is_installed(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = train(
        tiny.network, tiny.masked, tiny.cells, CONFIG.replace(n_steps=20), title="t", run_dir=tmp_path, progress=False
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [9, 19]
    assert [event.value for event in events] == pytest.approx([float(module.losses[step]) for step in (9, 19)])


def test_a_truncated_checkpoint_is_refused_and_the_one_before_used(tiny, tmp_path, caplog):
    run = tmp_path / "run"
    train(tiny.network, tiny.masked, tiny.cells, CONFIG, title="t", run_dir=run, progress=False)
    newest = run / "checkpoints" / "step=12.ckpt"
    newest.write_bytes(newest.read_bytes()[:2000])
    with pytest.raises(ModelFileError, match="cut short or damaged"):
        read_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        found = Resumption.newest(run)
    assert (found.path.name, found.step) == ("step=8.ckpt", 8)
    assert f"{newest} is cut short or damaged" in caplog.text
    assert "an older checkpoint is used" in caplog.text


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    io = AtomicCheckpointIO()
    path = tmp_path / "step=1.ckpt"
    io.save_checkpoint({"global_step": 1}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"The disk is full: .*step=1\.ckpt is unchanged"):
        io.save_checkpoint({"global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["step=1.ckpt"]


def test_a_nan_loss_names_step_and_cells(tiny):
    class Poisoned(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 7:
                with torch.no_grad():
                    module.network.blocks[0].attention.qkv.weight.fill_(torch.nan)

    with pytest.raises(NonFiniteLossError, match=r"nan at step 8, in the batch of cells \d+, \d+"):
        train(tiny.network, tiny.masked, tiny.cells, CONFIG, title="t", progress=False, callbacks=[Poisoned()])


def test_an_interrupt_keeps_the_weights_and_gives_ctrl_c_back(tiny):
    class Interrupt(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    before, handler = weights(tiny.network), signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="Interrupted after 5 of 12 steps"):
        module = train(
            tiny.network, tiny.masked, tiny.cells, CONFIG, title="t", progress=False, callbacks=[Interrupt()]
        )
    assert len(module.losses) == 5
    assert not same(before, weights(tiny.network))
    assert signal.getsignal(signal.SIGINT) is handler


def test_validation_keeps_the_best_weights(tiny):
    class Spoil(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 9:
                with torch.no_grad():
                    module.network.embedding.gene.weight.mul_(50.0)
            elif trainer.global_step == 8:
                self.at_eight = weights(module.network)

    spoil = Spoil()
    module = train(
        tiny.network, tiny.masked, tiny.cells.select(range(150)), CONFIG.replace(validate_every=4), title="t",
        validation=tiny.cells.select(range(150, 200)), progress=False, callbacks=[spoil],
    )  # fmt: skip
    steps, losses = zip(*module.validation_losses)
    assert steps == (4, 8, 12)
    assert losses[2] > losses[1]
    assert same(weights(tiny.network), spoil.at_eight)


@pytest.mark.parametrize("how", ["all", "head", "last:1", "lora:4"])
def test_only_what_is_trainable_moves(tiny, how):
    before = weights(tiny.network)
    train(tiny.network, tiny.classify, tiny.cells, CONFIG.replace(trainable=how), title="t", progress=False)
    after = weights(tiny.network)
    assert before.keys() == after.keys()  # low-rank updates were merged
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("class_head") for name in moved)
    blocks = {name.split(".")[1] for name in moved if name.startswith("blocks.")}
    assert blocks == {"all": {"0", "1"}, "head": set(), "last:1": {"1"}, "lora:4": {"0", "1"}}[how]
    assert any(name.startswith("embedding.") for name in moved) == (how == "all")
    assert all(parameter.requires_grad for parameter in tiny.network.parameters())


def test_a_gene_embedding_that_the_family_freezes_stays_frozen(tiny):
    network = tiny.make_network(classes={"n_classes": 3}, embedding={"train_genes": False})
    before = weights(network)
    train(network, tiny.classify, tiny.cells, CONFIG, title="t", progress=False)
    assert torch.equal(network.embedding.gene.weight, before["embedding.gene.weight"])
    assert not torch.equal(network.embedding.rank.weight, before["embedding.rank.weight"])
    assert not network.embedding.gene.weight.requires_grad


def test_low_rank_updates_start_as_nothing_and_merge_exactly(tiny):
    network = tiny.network.eval()
    cells = tiny.cells.select(range(8))
    plain = network(cells)
    adapted = copy.deepcopy(network)
    n_trainable = set_trainable(adapted, "lora:4")
    assert n_trainable < sum(parameter.numel() for parameter in network.parameters()) / 2
    assert torch.equal(adapted(cells), plain)
    for module in adapted.modules():
        if hasattr(module, "up") and isinstance(module.up, torch.nn.Parameter):
            torch.nn.init.normal_(module.up, std=0.1)
    changed = adapted(cells)
    assert not torch.allclose(changed, plain, atol=1e-3)
    merge(adapted)
    torch.testing.assert_close(adapted(cells), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["some", "last:9", "last", "lora:x"])
def test_an_unknown_way_of_fine_tuning_is_refused(tiny, how):
    with pytest.raises(ValueError, match="`trainable`"):
        set_trainable(tiny.network, how)


def test_activation_checkpointing_changes_nothing_but_memory(tiny):
    runs = []
    for checkpointing in (False, True):
        network = tiny.make_network(classes={"n_classes": 3})
        config = CONFIG.replace(activation_checkpointing=checkpointing)
        runs.append(torch.stack(train(network, tiny.masked, tiny.cells, config, title="t", progress=False).losses))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


def test_batches_keep_to_the_token_budget(tiny):
    seen = []

    class Count(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(batch[0].n_tokens)

    train(tiny.network, tiny.masked, tiny.cells, CONFIG, title="t", progress=False, callbacks=[Count()])
    assert max(seen) <= CONFIG.tokens_per_step
    assert min(seen) > 0


@pytest.mark.parametrize(
    "wrong", [{"n_steps": 0}, {"learning_rate": -1.0}, {"warmup_fraction": 1.0}, {"precision": "8"}, {"schedule": "x"}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"FitConfig.{next(iter(wrong))}"):
        FitConfig(**wrong)


def test_settings_survive_json_and_unknown_ones_do_not():
    assert FitConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="no field 'wings'"):
        FitConfig.from_dict({"wings": 2})


def test_an_empty_batch_is_not_divided_by(tiny):
    empty = CellBatch(gene_ids_T=torch.zeros(0, dtype=torch.int32), cu_seqlens=torch.zeros(1, dtype=torch.int32))
    _, targets = tiny.masked.corrupt(empty, torch.Generator())
    assert targets["token_N"].numel() == 0


def test_compiled_blocks_learn_the_same_and_are_compiled_once_for_batches_of_any_shape(tiny, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(trainable, "COMPILE_BACKEND", counter)
    runs, compilations = [], []

    class Count(lightning.Callback):
        def on_train_batch_end(self, *_):
            compilations.append(counter.frame_count)

    for compiled in (False, True):
        network = tiny.make_network(dropout=0.0)
        config = CONFIG.replace(compile=compiled)
        callbacks = [Count()] if compiled else []
        module = train(network, tiny.masked, tiny.cells, config, title="t", progress=False, callbacks=callbacks)
        runs.append(torch.stack(module.losses))
        assert all(block._compiled_call_impl is None for block in network.blocks)
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)
    assert compilations[0] > 0
    assert compilations[2] == compilations[-1]


def test_bfloat16_weights_learn_and_the_network_is_float32_again(tiny):
    config = CONFIG.replace(n_steps=30, precision="bf16-true")
    module = train(tiny.network, tiny.classify, tiny.cells, config, title="t", progress=False)
    assert all(parameter.dtype == torch.float32 for parameter in tiny.network.parameters())
    assert torch.stack(module.losses[-5:]).mean() < 0.6 * torch.stack(module.losses[:5]).mean()


@pytest.mark.parametrize(
    ("cuda", "bf16", "expected"), [(False, False, "32-true"), (True, False, "32-true"), (True, True, "bf16-mixed")]
)
def test_the_precision_is_that_of_the_device(monkeypatch, cuda, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert resolved_precision(FitConfig()) == expected
    assert resolved_precision(FitConfig(precision="16-mixed")) == "16-mixed"
    assert resolved_precision(FitConfig(accelerator="cpu")) == "32-true"


def test_the_gene_embedding_has_a_rate_of_its_own(tiny):
    before = weights(tiny.network)
    train(
        tiny.network,
        tiny.masked,
        tiny.cells,
        CONFIG.replace(embedding_learning_rate_scale=0),
        title="t",
        progress=False,
    )
    after = weights(tiny.network)
    assert torch.equal(before["embedding.gene.weight"], after["embedding.gene.weight"])
    assert not torch.equal(before["embedding.rank.weight"], after["embedding.rank.weight"])
    groups = parameter_groups(tiny.network, FitConfig(learning_rate=0.1, embedding_learning_rate_scale=0.5))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rates.pop(id(tiny.network.embedding.gene.weight)) == 0.05
    assert set(rates.values()) == {0.1}


def test_a_second_ctrl_c_stops_at_once(tiny):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Press(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(UserWarning, match="Interrupted after 3 of 12 steps"):
        train(tiny.network, tiny.masked, tiny.cells, CONFIG, title="t", progress=False, callbacks=[Press()])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_checkpoints_are_written_by_the_clock_too(tiny, tmp_path):
    class Clock:
        now = 0.0

        def monotonic(self):
            Clock.now += 10.0
            return Clock.now

        perf_counter = monotonic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "time", Clock())
        config = CONFIG.replace(checkpoint_every=1000, checkpoint_minutes=0.1)
        train(tiny.network, tiny.masked, tiny.cells, config, title="t", run_dir=tmp_path, progress=False)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step=5.ckpt", "step=10.ckpt"}
