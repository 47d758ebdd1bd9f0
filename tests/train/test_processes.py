"""Several processes train one model: the same as one process with the same batches, for every objective, also resumed."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scfm
from scfm.train import FitConfig, train
from scfm.train.module import TrainingModule, parameter_groups
from scfm.train.ranks import devices_and_nodes, lanes_of, rank_and_world_size
from scfm.train.trainable import freeze_unused, merge, set_trainable

CONFIG = FitConfig(n_steps=4, tokens_per_step=300, checkpoint_every=2, accelerator="cpu")


def torchrun(script, path, n_processes, timeout=280):
    """Run a script in so many processes; returns what went wrong, if anything did."""
    path.write_text(script)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n_processes),
        path,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    return "" if done.returncode == 0 else done.stderr


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import WithWeights, make_cells, make_network
from scfm.nn import ClassHeadConfig
from scfm.objectives import Classification, MaskedGenes
from scfm.train import FitConfig, train

for name, make in (
    ("masked", lambda network: MaskedGenes(mask_id=1, is_gene_V=network.is_gene_V)),
    ("classification", lambda network: Classification()),
    ("with_weights", lambda network: WithWeights()),
):
    network = make_network(classes=ClassHeadConfig(n_classes=3))  # of whose heads each objective uses one
    module = train(network, make(network), make_cells(), FitConfig(**{config!r}), title="t", progress=False,
                   run_dir={out!r} + "/" + name)
    if module.global_rank == 0:
        torch.save((network.state_dict(), torch.stack(module.losses)), {out!r} + "/" + name + ".pt")
"""


def trained(tmp_path, n_processes, config, out):
    out.mkdir(exist_ok=True)
    script = WORKER.format(tests=str(Path(__file__).parent), out=str(out), config=config.to_dict())
    failure = torchrun(script, tmp_path / "worker.py", n_processes)
    assert failure == "", failure[-3000:]
    return {name: torch.load(out / f"{name}.pt", weights_only=True) for name in NOT_COMPARED}


# Running statistics of batch norm are those of the batches of one process; no gradient depends on them. It also takes away
# what the last bias adds to all cells: its gradient, 2e-8, is rounding, which AdamW makes as large as any other.
NOT_COMPARED = {
    "masked": (),
    "classification": ("class_head.norm.", "blocks.1.feed_forward_norm.bias"),
    "with_weights": (),
}


def assert_close(one, other):
    for name, left_out in NOT_COMPARED.items():
        torch.testing.assert_close(one[name][1], other[name][1], rtol=1e-5, atol=1e-5)
        weights = [
            {key: value for key, value in each[name][0].items() if not key.startswith(left_out)}
            for each in (one, other)
        ]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_two_batches_and_either_resumes_the_other(tmp_path):
    """Dropout and masks included, with heads that the objective does not use."""
    two = trained(tmp_path, 2, CONFIG, tmp_path / "two")
    one = trained(tmp_path, 1, CONFIG.replace(accumulate=2), tmp_path / "one")
    assert_close(two, one)
    longer = CONFIG.replace(n_steps=7, checkpoint_every=3)
    resumed = [trained(tmp_path, n, longer, tmp_path / name) for n, name in ((1, "two"), (2, "one"))]
    assert_close(*resumed)
    assert len(resumed[0]["masked"][1]) == 7


PRETRAIN = """
import sys, torch, scfm
config = scfm.FitConfig(n_steps=4, tokens_per_step=600, accelerator="cpu")
model = scfm.pretrain({files!r}, {out!r}, validation=0.1, config=config, progress=False)
"""


def write_files(folder):
    files = []
    for number in range(2):
        rng = np.random.default_rng(number)
        counts = rng.poisson(rng.gamma(0.3, 3.0, 50), (60, 50)).astype(np.float32)
        counts[:, 0] = 1
        genes = pd.DataFrame(index=[f"GENE{n}" for n in range(50)])
        files.append(str(folder / f"{number}.h5ad"))
        anndata.AnnData(sparse.csr_matrix(counts), var=genes).write_h5ad(files[-1])
    return files


@pytest.mark.slow
def test_torchrun_without_any_option_pretrains_one_model(tmp_path):
    files = write_files(tmp_path)
    script = PRETRAIN.format(files=files, out=str(tmp_path / "two"))
    assert torchrun(script, tmp_path / "pretrain.py", 2)[-3000:] == ""
    config = FitConfig(n_steps=4, tokens_per_step=600, accelerator="cpu", accumulate=2)
    one = scfm.pretrain(files, tmp_path / "one", validation=0.1, config=config, progress=False)
    two = scfm.load(tmp_path / "two" / "model")
    for key in ("losses", "validation_losses"):
        got, expected = (np.ravel(model.history["stages"][0][key]) for model in (two, one))
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    torch.testing.assert_close(two.network.state_dict(), one.network.state_dict(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_process_finishes_what_was_killed_under_torchrun(tmp_path):
    """At a random moment after the first checkpoint: the loss curve and the weights are those of a run without a kill."""
    files = write_files(tmp_path)
    options = ["--n-steps", "40", "--tokens-per-step", "600", "--accelerator", "cpu", "--no-progress"]
    command = [sys.executable, "-m", "scfm.cli", "pretrain", *files]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = subprocess.Popen(
        [*torchrun, killed, *options, "--checkpoint-every", "2"], env=environment, stderr=subprocess.DEVNULL
    )
    while run.poll() is None and not list(killed.glob("checkpoints/*.ckpt")):
        time.sleep(0.01)
    time.sleep(random.random())
    subprocess.run(["pkill", "-KILL", "-f", str(killed)], check=False)  # torchrun and both of its processes
    assert run.wait() == -signal.SIGKILL  # it was running
    subprocess.run([*command, killed, *options], env=environment, check=True, capture_output=True)
    subprocess.run([*command, whole, *options, "--accumulate", "2"], env=environment, check=True, capture_output=True)
    losses = [pd.read_csv(out / "losses.csv").to_numpy(dtype=float) for out in (killed, whole)]
    assert len(losses[0]) == 40
    np.testing.assert_allclose(*losses, rtol=1e-5)
    states = [scfm.load(out / "model").network.state_dict() for out in (killed, whole)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_shards_do_what_one_process_does_and_one_process_resumes_them(tmp_path):
    """FSDP over two processes: weights, losses, and checkpoints, which have every shard when they have their name."""
    config = CONFIG.replace(strategy="fsdp")
    two = trained(tmp_path, 2, config, tmp_path / "two")
    one = trained(tmp_path, 1, CONFIG.replace(accumulate=2), tmp_path / "one")
    assert_close(two, one)
    folder = tmp_path / "two" / "masked" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    shards = sorted(path.name for path in (folder / "step=4.ckpt").iterdir())
    assert shards == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    longer = CONFIG.replace(n_steps=7, checkpoint_every=3)
    resumed = trained(tmp_path, 1, longer, tmp_path / "two")
    assert_close(resumed, trained(tmp_path, 1, longer, tmp_path / "one"))
    assert len(resumed["masked"][1]) == 7


@pytest.mark.slow
def test_four_processes_and_validation_in_shards(tmp_path):
    """With the best weights by validation, which every process has in the end."""
    out = tmp_path / "out"
    out.mkdir()
    script = VALIDATED.format(tests=str(Path(__file__).parent), out=str(out), config=CONFIG.to_dict())
    assert torchrun(script, tmp_path / "worker.py", 4)[-3000:] == ""
    states = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


VALIDATED = """
import sys
sys.path.insert(0, {tests!r})
from conftest import EveryThirdGene, make_cells, make_network
import torch
from scfm.train import FitConfig, train

network, config = make_network(dropout=0.0), FitConfig(**{config!r}).replace(strategy="fsdp", validate_every=2)
module = train(network, EveryThirdGene(), make_cells(), config, title="t", progress=False,
               validation=make_cells(40, seed=1), run_dir={out!r})
best = min(loss for _, loss in module.validation_losses)
network.eval()
from scfm.objectives import total
objective, cells = EveryThirdGene(), make_cells(40, seed=1)
with torch.no_grad():
    from scfm.data import TokenBudgetSampler
    batches = [cells.select(rows) for rows in TokenBudgetSampler(cells.lengths_B.numpy(), max_tokens=300, shuffle=False)]
    losses = [total(objective.loss(network, *objective.corrupt(batch, None))) for batch in batches]
    weights = torch.tensor([float(len(batch)) for batch in batches])
    found = float((torch.stack(losses) * weights).sum() / weights.sum())
assert abs(found - best) < 1e-5, (found, best)
torch.save(network.state_dict(), {out!r} + "/" + str(module.global_rank) + ".pt")
"""


def plain_loop(network, objective, cells, config, n_batches):
    """Steps of AdamW on the mean loss of so many batches."""
    from scfm.data import TokenBudgetSampler
    from scfm.objectives import total

    recipe = TrainingModule(network, objective, config)
    optimizer = torch.optim.AdamW(parameter_groups(network, recipe.config))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate_at)
    sampler = functools.partial(
        TokenBudgetSampler, cells.lengths_B.numpy(), max_tokens=config.tokens_per_step, world_size=n_batches
    )
    lanes = [iter(sampler(rank=lane)) for lane in range(n_batches)]
    for _ in range(config.n_steps):
        batches = [objective.corrupt(cells.select(next(lane)), torch.Generator()) for lane in lanes]
        loss = torch.stack([total(objective.loss(network, *batch)) for batch in batches]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_a_plain_loop_over_the_mean_loss_of_the_batches_of_a_step(tiny, accumulate):
    config = CONFIG.replace(accumulate=accumulate)
    ours, plain = tiny.make_network(dropout=0.0), tiny.make_network(dropout=0.0).train()
    train(ours, tiny.every_third, tiny.cells, config, title="t", progress=False)
    plain_loop(plain, tiny.every_third, tiny.cells, config, n_batches=accumulate)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def as_process(monkeypatch, rank, world_size, on_node=None):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_WORLD_SIZE", on_node or world_size)):
        monkeypatch.setenv(name, str(value))


def test_processes_are_counted_by_what_torchrun_started(monkeypatch):
    assert (rank_and_world_size(CONFIG), devices_and_nodes(CONFIG)) == ((0, 1), (1, 1))
    as_process(monkeypatch, rank=5, world_size=8, on_node=4)
    assert (rank_and_world_size(CONFIG), devices_and_nodes(CONFIG)) == ((5, 8), (4, 2))
    assert rank_and_world_size(CONFIG.replace(devices=4, n_nodes=2)) == (5, 8)
    with pytest.raises(ValueError, match=r"`devices` is 2 .*torchrun started 8 processes"):
        rank_and_world_size(CONFIG.replace(devices=2))


def test_several_devices_without_torchrun_are_refused():
    with pytest.raises(ValueError, match="Start several processes with torchrun"):
        rank_and_world_size(CONFIG.replace(devices=2))


def test_the_batches_of_a_step_are_divided_among_the_processes(monkeypatch):
    lanes = []
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        mine, n_lanes = lanes_of(CONFIG.replace(accumulate=3))
        lanes += mine
        assert n_lanes == 6
    assert sorted(lanes) == list(range(6))


def test_a_run_that_cannot_be_divided_among_the_processes_is_refused(tiny, tmp_path, monkeypatch):
    train(
        tiny.network, tiny.masked, tiny.cells, CONFIG.replace(accumulate=2), title="t", run_dir=tmp_path, progress=False
    )
    as_process(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match=r"2 batches in each step.*among 3 processes\. Resume it with 1 or 2"):
        train(tiny.network, tiny.masked, tiny.cells, CONFIG, title="t", run_dir=tmp_path, progress=False)


def test_parameters_that_a_loss_does_not_depend_on_are_frozen_for_the_time_of_training(tiny):
    set_trainable(tiny.network, "all")
    frozen = freeze_unused(tiny.network, tiny.masked, tiny.cells.select(range(8)))
    assert {name.split(".")[0] for name in frozen} == {"class_head"}
    inputs, targets = tiny.masked.corrupt(tiny.cells, torch.Generator())
    scfm.objectives.total(tiny.masked.loss(tiny.network, inputs, targets)).backward()
    for name, parameter in tiny.network.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    merge(tiny.network)
    assert all(parameter.requires_grad for parameter in tiny.network.parameters())


def test_random_features_are_redrawn_alike_on_all_processes():
    """Processes differ in the state of their generators, not in their features."""
    from scfm import families

    preset = families.preset("scbert")
    network = families.merged(preset.network, {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 16})
    config = scfm.ModelConfig.from_dict({**network, "n_tokens": 30})
    attention = scfm.models.CellTransformer(config).blocks[0].attention
    first, drawn = attention.projection_MK.clone(), []
    for seed in (1, 2):
        attention.projection_MK.copy_(first)
        torch.manual_seed(seed)
        attention.redraw_projection()
        drawn.append(attention.projection_MK.clone())
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], first)
    attention.redraw_projection()
    assert not torch.equal(attention.projection_MK, drawn[0])
