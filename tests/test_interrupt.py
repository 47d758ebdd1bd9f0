"""Ctrl-C: a real signal, in the middle of training, keeps what is best and gives control back."""

import os
import signal

import lightning
import pytest
import torch

import scfm
from scfm.train import callbacks, train

CONFIG = scfm.FitConfig(n_steps=12, tokens_per_step=2048)


class Press(lightning.Callback):
    """Presses Ctrl-C after step 6, having spoilt the weights, and remembers those of step 4."""

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 4:
            self.at_four = {name: tensor.clone() for name, tensor in module.network.state_dict().items()}
        elif trainer.global_step == 6:
            with torch.no_grad():
                module.network.embedding.gene.weight.mul_(50.0)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _interrupts_count():
    """A process that a shell started in the background ignores Ctrl-C; this one is not to."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def adata():
    return scfm.datasets.pbmc()[:60].copy()


def test_the_best_weights_so_far_are_kept(adata):
    model = scfm.fit(adata.copy(), config=CONFIG.replace(n_steps=1), progress=False)
    cells, press = scfm.pp.encode(adata, model), Press()
    objective = scfm.objectives.MaskedGenes(
        mask_id=model.encoding.vocabulary.mask_id, is_gene_V=model.network.is_gene_V
    )
    with pytest.warns(UserWarning, match="Interrupted after 6 of 12 steps"):
        train(
            model.network, objective, cells.select(range(50)),
            CONFIG.replace(validate_every=4), title="t", validation=cells.select(range(50, 60)), progress=False,
            callbacks=[press],
        )  # fmt: skip
    kept = model.network.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in press.at_four.items())


def test_a_fit_that_was_interrupted_gives_a_model_that_works(adata, monkeypatch, tmp_path):
    watch = callbacks.StopOnNonFiniteLoss.on_train_batch_end

    def press(self, trainer, *rest):
        watch(self, trainer, *rest)
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(callbacks.StopOnNonFiniteLoss, "on_train_batch_end", press)
    with pytest.warns(UserWarning, match="Interrupted after 3 of 12 steps"):
        model = scfm.fit(adata, config=CONFIG, progress=False)
    assert len(model.history["stages"][0]["losses"]) == 3
    model.save(tmp_path / "model")
    scfm.tl.embed(adata, scfm.load(tmp_path / "model"))
