"""Pretraining from files: streams, resumes, refuses to mix runs, and is the same from two processes as from one."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scfm
from scfm import families
from scfm.data import TokenBudgetSampler
from scfm.objectives import total
from scfm.train import FitConfig, PretrainConfig, pretrain, train
from scfm.train.module import TrainingModule, parameter_groups
from scfm.train.pretrain import learn_encoding

CONFIG = PretrainConfig(fit=FitConfig(n_steps=6, tokens_per_step=600, checkpoint_every=2, accelerator="cpu"))


def write_file(path, genes, seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.3, 3.0, len(genes)), (60, len(genes))).astype(np.float32)
    counts[:, 0] = 1  # no empty cell
    adata = anndata.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=genes))
    adata.write_h5ad(path)
    return adata


@pytest.fixture
def files(tmp_path):
    genes = [f"GENE{number}" for number in range(60)]
    write_file(tmp_path / "a.h5ad", genes[:50], seed=0)
    write_file(tmp_path / "b.h5ad", genes[10:], seed=1)
    return [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]


def test_it_leaves_a_model_and_a_record(files, tmp_path):
    model = pretrain(files, tmp_path / "run", CONFIG, progress=False)
    out = tmp_path / "run"
    assert {"model", "config.json", "losses.csv", "losses.png", "README.md", "checkpoints"} <= {
        path.name for path in out.iterdir()
    }
    assert len(pd.read_csv(out / "losses.csv")) == 6
    assert json.loads((out / "config.json").read_text())["pretrain"] == CONFIG.to_dict()
    assert model.id in (out / "README.md").read_text()
    assert scfm.load(out / "model").id == model.id


def test_the_vocabulary_and_the_medians_span_all_files(files):
    encoding = learn_encoding(files, CONFIG)
    adatas = [anndata.read_h5ad(path) for path in files]
    joined = anndata.concat(adatas, join="outer", fill_value=0, keys=["a", "b"], index_unique="-")
    expected = scfm.encoding.make_encoding("rank", adata=joined)
    assert set(encoding.vocabulary.genes) == set(expected.vocabulary.genes)
    for gene in encoding.vocabulary.genes:
        got, wanted = (each.medians[each.vocabulary.token_ids([gene])[0]] for each in (encoding, expected))
        assert got == pytest.approx(wanted, rel=1e-6), gene


@pytest.mark.parametrize("changes", [{}, {"encoding": "bin", "objective": "generative"}])
def test_a_stopped_run_goes_on_to_the_same_weights(files, tmp_path, monkeypatch, changes):
    config = replace(CONFIG, **changes)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise SystemExit(143)  # as the command line does on SIGTERM

    whole = pretrain(files, tmp_path / "whole", config, progress=False)
    with monkeypatch.context() as patch:
        patch.setitem(pretrain.__globals__, "train", functools.partial(train, callbacks=[Stop()]))
        with pytest.raises(SystemExit) as stopped:
            pretrain(files, tmp_path / "broken", config, progress=False)
    where = tmp_path / "broken" / "checkpoints"
    assert stopped.value.__notes__ == [f"Checkpoints are in {where}; the same call goes on from the newest."]
    resumed = pretrain(files, tmp_path / "broken", config, progress=False)
    assert whole.id == resumed.id


def test_a_folder_with_another_run_is_refused(files, tmp_path):
    pretrain(files, tmp_path / "run", CONFIG, progress=False)
    with pytest.raises(ValueError, match="other settings"):
        pretrain(files, tmp_path / "run", PretrainConfig(fit=CONFIG.fit.replace(seed=1)), progress=False)
    with pytest.raises(ValueError, match="other data"):
        pretrain(files[:1], tmp_path / "run", CONFIG, progress=False)


def test_the_config_that_a_run_writes_runs_it_again(files, tmp_path):
    model = pretrain(files, tmp_path / "run", CONFIG, progress=False)
    again = PretrainConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert again == CONFIG
    assert pretrain(files, tmp_path / "again", again, progress=False).id == model.id


# Each family's shape with one thin layer, so that a step takes a moment.
THIN = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 16}


@pytest.mark.parametrize(
    ("preset", "objective", "expected"),
    [
        ("geneformer-v1-10m", None, "masked_genes"),
        ("scgpt-human", None, "generative"),
        ("scgpt-human", "masked", "masked_values"),
        ("scbert", None, "masked_buckets"),
        ("scfoundation", None, "read_depth"),
    ],
)
def test_a_published_shape_is_pretrained_in_its_own_way(files, tmp_path, monkeypatch, preset, objective, expected):
    attention = {"kind": "linear", "qkv_bias": False, "head_width": 8}
    decoder = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 64, "attention": attention}
    parts = {"scbert": {"attention": {"head_width": None}}, "scfoundation": {"decoder": decoder}}

    def thin(name, **wanted):
        found = families.choose_preset(name, **wanted)
        return replace(found, network=families.merged(found.network, THIN, parts.get(preset, {})))

    monkeypatch.setattr(sys.modules["scfm.train.pretrain"], "choose_preset", thin)
    config = PretrainConfig(preset=preset, objective=objective, fit=CONFIG.fit.replace(n_steps=2))
    model = pretrain(files, tmp_path / "run", config, progress=False)
    assert model.history["stages"][0]["objective"] == expected
    loaded = scfm.load(tmp_path / "run" / "model")
    embedding = scfm.tl.embed(anndata.read_h5ad(files[0]), loaded, copy=True).obsm["X_scfm"]
    assert embedding.shape == (60, loaded.network.config.d_embedding)
    assert np.isfinite(embedding).all()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"objective": "generative"}, "encoding='bin'"),
        ({"objective": "generative", "preset": "geneformer-v1-10m"}, "encoding='bin'"),
        ({"preset": "tiny"}, "choose one of small"),
        ({"preset": "scbert", "encoding": "rank"}, "has 'bucket'"),
        ({"objective": "causal"}, "choose one of masked, generative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        PretrainConfig(**wrong)


def test_config_files_are_checked():
    assert PretrainConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(ValueError, match="no field wings"):
        PretrainConfig.from_dict({"wings": 2})


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from conftest import EveryThirdGene, make_cells, make_network
import torch
from scfm.train import FitConfig, train

network = make_network(dropout=0.0)
config = FitConfig(**{config!r})
module = train(network, EveryThirdGene(), make_cells(), config, title="t", progress=False)
if module.global_rank == 0:
    torch.save(network.state_dict(), {out!r})
"""


def torchrun_training(tmp_path, config, n_processes):
    """Weights after training by `config` in so many processes."""
    out, script = tmp_path / "out.pt", tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), out=str(out), config=config.to_dict()))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n_processes),
        str(script),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True, map_location="cpu")


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_same_global_batch(tiny, tmp_path):
    """The global batch of a step is the two ranks' batches, and loss denominators are summed over the ranks."""
    config = FitConfig(n_steps=3, tokens_per_step=300, accelerator="cpu", devices=2, strategy="ddp")
    parallel = torchrun_training(tmp_path, config, n_processes=2)
    network = tiny.make_network(dropout=0.0).train()
    _train_on_joined_batches(network, tiny.every_third, tiny.cells, config, n_ranks=2)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(parallel[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.slow
def test_shards_do_what_one_device_does_with_the_same_global_batch(tiny, tmp_path):
    """FSDP on one or two CUDA devices against a plain loop on the CPU."""
    n_devices = min(2, torch.cuda.device_count())
    config = FitConfig(n_steps=3, tokens_per_step=300, devices=n_devices, strategy="fsdp")
    parallel = torchrun_training(tmp_path, config, n_processes=n_devices)
    network = tiny.make_network(dropout=0.0).train()
    _train_on_joined_batches(network, tiny.every_third, tiny.cells, config, n_ranks=n_devices)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(parallel[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def _train_on_joined_batches(network, objective, cells, config, n_ranks):
    """A plain loop in one process over the union of what the ranks see."""
    recipe = TrainingModule(network, objective, config)
    optimizer = torch.optim.AdamW(parameter_groups(network, config.weight_decay), lr=recipe.config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate_at)
    lengths = cells.lengths_B.numpy()
    samplers = [
        iter(
            TokenBudgetSampler(
                lengths, max_tokens=config.tokens_per_step, seed=config.seed, rank=rank, world_size=n_ranks
            )
        )
        for rank in range(n_ranks)
    ]
    for _ in range(config.n_steps):
        rows = np.concatenate([next(sampler) for sampler in samplers])
        loss = total(objective.loss(network, *objective.corrupt(cells.select(rows), torch.Generator())))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
