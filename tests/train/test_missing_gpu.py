"""A GPU that is asked for and is not there is refused in one sentence, before anything is computed."""

import pytest
import torch

import scfm

no_gpu = pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")


@no_gpu
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"], ids=["CUDA", "any"])
def test_training_says_that_there_is_no_gpu(accelerator):
    config = scfm.FitConfig(n_steps=1, accelerator=accelerator)
    with pytest.raises(ValueError, match=r"`accelerator` is .*torch.*Pass 'cpu'"):
        scfm.fit(scfm.datasets.pbmc()[:20].copy(), config=config, context_length=32, progress=False)


@no_gpu
def test_moving_a_model_says_that_there_is_no_gpu():
    config = scfm.FitConfig(n_steps=1, tokens_per_step=256)
    model = scfm.fit(scfm.datasets.pbmc()[:20].copy(), config=config, context_length=32, progress=False)
    with pytest.raises(ValueError, match="`device` is 'cuda'"):
        model.to("cuda")
    assert model.device.type == "cpu"
