"""The first block of a network for all single deletions of a cell, with shared parts computed once.

After deletion of a gene, genes before it are unchanged, and genes after it move by one rank at most. The first block
therefore has two versions of each token as input, not N, and their queries, keys and values are computed once. For a run
of consecutive deletions, the keys outside the run are the same, so attention over them is computed once per run, and
then merged with attention over the keys of the run.
"""

# Axes: N tokens of the cell, C deletions of a run, Q queries, J keys of a run in both versions, H heads, K head width,
# D model width.

from __future__ import annotations

import torch
from torch import Tensor

from scfm import ops
from scfm.nn.block import Block


class DeletionBlock:
    """A block with softmax attention, prepared for the deletions of one cell.

    Parameters
    ----------
    block
        The first block of the network.
    stays_ND
        Input of the block for the complete cell, shape (N, D).
    moved_ND
        Input with all tokens moved by one rank, shape (N, D); `stays_ND` if ranks do not change.
    """

    def __init__(self, block: Block, stays_ND: Tensor, moved_ND: Tensor) -> None:
        self._block = block
        self._hidden = stays_ND, moved_ND
        stays = block.project(stays_ND)
        self._projected = stays, stays if moved_ND is stays_ND else block.project(moved_ND)

    def run(self, deleted: range) -> Tensor:
        """Return the output of the block for the deletion of each token of a run, one after another, shape (C (N - 1), D)."""
        stays_ND, moved_ND = self._hidden
        parts = [part for index in deleted for part in (stays_ND[:index], moved_ND[index + 1 :])]
        return self._block.after_attention(torch.cat(parts), self._attend(deleted))

    def _attend(self, run: range) -> Tensor:
        """Return the attention output for each deletion, one after another, shape (C (N - 1), H, K)."""
        (q0, k0, v0), (q1, k1, v1) = self._projected
        first, stop, n_tokens, n_run = run.start, run.stop, len(q0), len(run)
        # Outside the run, tokens before it keep their rank and tokens after it move, so each query and key has the same
        # version for all deletions of the run.
        q_QHK = torch.cat([q0[:stop], q1[first:]])
        outside_QHK, lse_QH = ops.attention(
            q_QHK,
            torch.cat([k0[:first], k1[stop:]]),
            torch.cat([v0[:first], v1[stop:]]),
            torch.tensor([0, n_tokens + n_run], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, n_tokens - n_run], dtype=torch.int32),
            return_lse=True,
        )
        # Keys of the run, in both versions.
        k_HKJ = torch.cat([k0[first:stop], k1[first:stop]]).permute(1, 2, 0)
        v_HJK = torch.cat([v0[first:stop], v1[first:stop]]).transpose(0, 1)
        scores_HQJ = torch.matmul(q_QHK.transpose(0, 1), k_HKJ).float() * q_QHK.shape[-1] ** -0.5
        scores_HQJ = torch.cat([lse_QH.T[..., None], scores_HQJ], -1)
        outside_HQK = outside_QHK.transpose(0, 1)
        attended = q_QHK.new_empty(n_run, n_tokens - 1, *q_QHK.shape[1:])
        for number in range(n_run):
            seen_J = torch.zeros(2 * n_run, dtype=torch.bool, device=q_QHK.device)
            seen_J[:number], seen_J[n_run + number + 1 :] = True, True
            for queries, target in (
                (slice(0, first + number), slice(0, first + number)),
                (slice(stop + number + 1, None), slice(first + number, None)),
            ):
                _merge(scores_HQJ[:, queries], outside_HQK[:, queries], v_HJK, seen_J, attended[number, target])
        return attended.flatten(0, 1)


def _merge(scores_HQJ: Tensor, outside_HQK: Tensor, v_HJK: Tensor, seen_J: Tensor, into_QHK: Tensor) -> None:
    """Merge attention outside the run, whose log-sum-exp is the first score, with attention to the visible keys of the run."""
    hidden_J = torch.cat([seen_J.new_zeros(1), ~seen_J])
    probs_HQJ = torch.softmax(scores_HQJ.masked_fill(hidden_J, -torch.inf), -1).to(v_HJK.dtype)
    joined_HQK = torch.matmul(probs_HQJ[..., 1:], v_HJK)
    joined_HQK.addcmul_(probs_HQJ[..., :1], outside_HQK)
    into_QHK.copy_(joined_HQK.transpose(0, 1))
