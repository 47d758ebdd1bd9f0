"""Attention in the plainest possible torch, in float64, with autograd: the oracle of the kernel tests."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width, N tokens of a cell.

import torch


def visible(n_queries, n_keys, n_known):
    """Which keys each query of a cell attends to, (N, N), from the definition of the mask."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if n_known is not None:
        mask[:, n_known:] = False
        for query in range(n_known, n_queries):
            mask[query, query] = True
    return mask


def attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, n_known=None, key_bias=None, scale=None):
    """Output (Tq, H, K) and log-sum-exp (Tq, H); a query that attends to no key gives 0 and -inf."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = cu_seqlens.tolist()
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [], []
    for cell in range(len(bounds) - 1):
        query, key, value = (
            q[bounds[cell] : bounds[cell + 1]],
            *(tensor[bounds_k[cell] : bounds_k[cell + 1]] for tensor in (k, v)),
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        if key_bias is not None:
            bias = key_bias[bounds_k[cell] : bounds_k[cell + 1]]
            bias = bias[:, None].expand(-1, q.shape[1]) if bias.dim() == 1 else bias
            scores = scores + bias.T[:, None]
        mask = visible(len(query), len(key), None if n_known is None else int(n_known[cell]))
        scores = scores.masked_fill(~mask.to(scores.device), -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        probs = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1, keepdim=True).masked_fill(empty, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", probs, value))
        lses.append(lse[..., 0].T)
    return torch.cat(outs), torch.cat(lses)
