from itertools import chain

import numpy as np
import pytest
import torch

from scfm.data import CellBatch

LENGTHS = [3, 0, 5, 1, 2]


def batch(device="cpu"):
    cells = CellBatch(
        gene_ids_T=torch.arange(11, dtype=torch.int32),
        values_T=torch.arange(11) / 2,
        cu_seqlens=torch.tensor([0, *np.cumsum(LENGTHS)]),
        labels_B=torch.arange(5),
    )
    return cells.to(device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [[2, 0, 2, 1], [], [1], [-1, 4], np.array([3, 2]), torch.tensor([0, 4])])
def test_select_takes_whole_cells_in_the_order_asked_for(rows, device):
    taken = batch(device).select(rows)
    runs = np.split(np.arange(11), np.cumsum(LENGTHS)[:-1])
    expected = [runs[int(row)].tolist() for row in rows]
    assert taken.lengths_B.tolist() == [len(run) for run in expected]
    assert taken.gene_ids_T.tolist() == [*chain(*expected)]
    assert taken.values_T.tolist() == [token / 2 for token in [*chain(*expected)]]
    assert taken.labels_B.tolist() == [int(row) % 5 for row in rows]
    assert taken.cu_seqlens.dtype == taken.gene_ids_T.dtype == torch.int32


def test_a_selection_is_a_copy():
    cells = batch()
    cells.select([0]).gene_ids_T.fill_(99)
    assert cells.gene_ids_T[0] == 0


def test_a_mask_takes_the_cells_that_are_true():
    mask = np.array([False, True, True, False, True])
    for given in (mask, mask.tolist(), torch.from_numpy(mask)):
        assert batch().select(given).labels_B.tolist() == [1, 2, 4]
    assert batch().select(np.zeros(5, dtype=bool)).n_cells == 0


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([True, False], IndexError, r"mask has the shape \(2,\); the batch has 5"),
        ([5], IndexError, "no cell 5; the batch has 5"),
        ([-6], IndexError, "no cell -6"),
        ([0.5], TypeError, "whole numbers"),
    ],
)
def test_what_names_no_cells_is_refused(rows, error, words):
    with pytest.raises(error, match=words):
        batch().select(rows)
