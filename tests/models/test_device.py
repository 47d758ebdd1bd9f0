"""The device of a model that is loaded."""

import pytest
import torch

from scfm.models.device import resolved_device


def test_auto_is_the_gpu_of_the_process_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolved_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolved_device("auto") == torch.device("cuda", 3)
    assert resolved_device("cuda:1") == torch.device("cuda", 1)
    assert resolved_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`device` is 'cuda:1', but .*Pass 'cpu', or 'auto'"):
        resolved_device("cuda:1")
