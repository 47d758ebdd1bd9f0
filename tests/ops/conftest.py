"""Fixtures of the kernel tests, whose shared modules (`accuracy`, `oracle`, `problems`, ...) lie in this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from problems import Problem


@pytest.fixture
def make_problem():
    return Problem
