"""Shared fixtures. Real data sets are found through the environment variable SCFM_DATA."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def scfm_data() -> Path:
    folder = os.environ.get("SCFM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs the real data sets: set SCFM_DATA to their folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def _threads_are_given_back():
    """Whatever a test, or what it calls, sets: rounding depends on it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
