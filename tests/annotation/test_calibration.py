"""Temperatures that calibrate probabilities."""

import numpy as np
import pytest
from scipy.special import softmax

from scfm.annotation.calibration import fit_temperature


def test_temperature_recovers_the_one_that_labels_were_drawn_with():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 4))
    labels = np.array([rng.choice(4, p=p) for p in softmax(logits, axis=1)])
    assert fit_temperature(softmax(logits * 3, axis=1), labels) == pytest.approx(3, rel=0.05)
    assert fit_temperature(softmax(logits[:5], axis=1), labels[:5]) == 1  # too few to tell


def test_few_cells_that_are_all_right_do_not_make_probabilities_certain():
    proba = np.tile([0.6, 0.4], (12, 1))
    assert fit_temperature(proba, np.zeros(12, dtype=np.int64)) > 0.3
