"""Torch's private attention operators for GPUs, by their contracts: what they read, write and leave as they find it.

They take cells by boundaries and know no mask; the backward takes the given output and log-sum-exp as they are; rows that the
kernels do not write hold NaN here. `CPU_FLASH` computes each cell by torch's flash kernel for the CPU instead of from the
definition, so that rounding and the order of sums are those of a fused kernel.
"""

# Axes: B cells, T packed tokens (Tq queries, Tk keys), H heads, K head width, Q queries of a cell, N its keys.

from itertools import pairwise
from types import SimpleNamespace

import torch


def spans(cu_q, cu_k, longest_q, longest_k, q, k):
    """Queries and keys of each cell; checks what the kernels trust."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.shape == cu_k.shape
    assert len(cu_q) <= 65_536  # the grid of a launch
    assert (int(cu_q[0]), int(cu_q[-1])) == (0, q.shape[0])
    assert (int(cu_k[0]), int(cu_k[-1])) == (0, k.shape[0])
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist())):
        assert q1 - q0 <= longest_q
        assert k1 - k0 <= longest_k
        yield slice(q0, q1), slice(k0, k1)


def check_loads(*tensors):
    """The kernels load 16 bytes at once."""
    for tensor in tensors:
        assert tensor.stride(-1) == 1
        for offset in (tensor.storage_offset(), *tensor.stride()[-3:-1], tensor.shape[-1]):
            assert offset * tensor.element_size() % 16 == 0


def exact_forward(q, k, v, scale):
    scores_HQN = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    out = torch.einsum("hqk,khd->qhd", torch.softmax(scores_HQN, -1), v.float())
    return out.to(q.dtype), torch.logsumexp(scores_HQN, -1)


def exact_backward(grad_out, q, k, v, out, lse_HQ, scale):
    grad, query, key, value = (tensor.float() for tensor in (grad_out, q, k, v))
    prob_HQN = torch.exp(torch.einsum("qhd,khd->hqk", query, key) * scale - lse_HQ[..., None])
    delta_HQ1 = (grad * out.float()).sum(-1).T[..., None]
    grad_HQN = prob_HQN * (torch.einsum("qhd,khd->hqk", grad, value) - delta_HQ1) * scale
    grads = (
        torch.einsum("hqk,khd->qhd", grad_HQN, key),
        torch.einsum("hqk,qhd->khd", grad_HQN, query),
        torch.einsum("hqk,qhd->khd", prob_HQN, grad),
    )
    return tuple(tensor.to(q.dtype) for tensor in grads)


def cpu_flash_forward(q, k, v, scale):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), scale=scale
    )
    return out[0].transpose(0, 1), lse[0]


def cpu_flash_backward(grad_out, q, k, v, out, lse_HQ, scale):
    q, k, v, grad_out, out = (tensor.transpose(0, 1)[None].contiguous() for tensor in (q, k, v, grad_out, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse_HQ[None].contiguous(), 0.0, False, scale=scale
    )
    return tuple(tensor[0].transpose(0, 1) for tensor in grads)


def make(forward_cell, backward_cell):
    """Stand-ins for `torch.ops.aten`, with a count of their launches."""
    launches = []

    def run_forward(q, k, v, arguments, scale):
        check_loads(q, k, v)
        out, lse_of_cells = torch.full(q.shape, torch.nan, dtype=q.dtype), []
        for queries, keys in spans(*arguments, q, k):
            has_both = queries.start < queries.stop and keys.start < keys.stop
            lse_HQ = torch.full((q.shape[1], queries.stop - queries.start), torch.nan)
            if has_both:
                out[queries], lse_HQ = forward_cell(q[queries], k[keys], v[keys], scale)
            lse_of_cells.append((queries, lse_HQ))
        return out, lse_of_cells

    def run_backward(grad_out, q, k, v, out, lse_of, arguments, scale):
        check_loads(grad_out, q, k, v, out)
        grads = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.zeros_like(k), torch.zeros_like(v)
        for cell, (queries, keys) in enumerate(spans(*arguments, q, k)):
            if queries.start < queries.stop and keys.start < keys.stop:
                lse_HQ = lse_of(cell, queries)
                of_cell = backward_cell(grad_out[queries], q[queries], k[keys], v[keys], out[queries], lse_HQ, scale)
                for grad, rows, values in zip(grads, (queries, keys, keys), of_cell):
                    grad[rows] = values
        return grads

    def flash_forward(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, is_causal, debug, *, scale):
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert q.shape[-1] <= 256
        assert (dropout, is_causal, debug) == (0.0, False, False)
        launches.append("flash forward")
        out, lse_of_cells = run_forward(q, k, v, (cu_q, cu_k, longest_q, longest_k), scale)
        lse_HT = torch.full((q.shape[1], q.shape[0]), torch.inf)
        for queries, lse_HQ in lse_of_cells:
            lse_HT[:, queries] = lse_HQ
        return out, lse_HT, None, None, None

    def flash_backward(
        grad_out, q, k, v, out, lse_HT, cu_q, cu_k, longest_q, longest_k, dropout, is_causal, rng, _, *, scale
    ):
        assert lse_HT.is_contiguous()
        assert lse_HT.shape == (q.shape[1], q.shape[0])
        launches.append("flash backward")
        arguments = (cu_q, cu_k, longest_q, longest_k)
        return run_backward(grad_out, q, k, v, out, lambda _, queries: lse_HT[:, queries], arguments, scale)

    def efficient_forward(q, k, v, bias, cu_q, cu_k, longest_q, longest_k, dropout, mask, with_lse, *, scale):
        assert q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        assert (bias, dropout, mask, with_lse) == (None, 0.0, 0, True)
        launches.append("efficient forward")
        out, lse_of_cells = run_forward(q[0], k[0], v[0], (cu_q, cu_k, longest_q, longest_k), scale)
        lse_BHL = torch.full((len(cu_q) - 1, q.shape[2], -(-longest_q // 32) * 32), torch.nan)
        for cell, (queries, lse_HQ) in enumerate(lse_of_cells):
            lse_BHL[cell, :, : queries.stop - queries.start] = lse_HQ
        return out[None], lse_BHL, None, None, longest_q, longest_k

    def efficient_backward(
        grad_out, q, k, v, bias, out, cu_q, cu_k, longest_q, longest_k, lse_BHL, dropout, seed, offset, mask, bias_grad, *,
        scale, num_splits_key,
    ):  # fmt: skip
        assert num_splits_key == (1 if torch.are_deterministic_algorithms_enabled() else None)
        assert lse_BHL.shape == (len(cu_q) - 1, q.shape[2], -(-longest_q // 32) * 32)
        launches.append("efficient backward")

        def lse_of(cell, queries):
            n_queries = queries.stop - queries.start
            assert (lse_BHL[cell, :, n_queries:] == torch.inf).all()  # blocks are read to their end
            return lse_BHL[cell, :, :n_queries]

        arguments = (cu_q, cu_k, longest_q, longest_k)
        grads = run_backward(grad_out[0], q[0], k[0], v[0], out[0], lse_of, arguments, scale)
        return *(grad[None] for grad in grads), None

    return SimpleNamespace(
        launches=launches,
        _flash_attention_forward=flash_forward,
        _flash_attention_backward=flash_backward,
        _efficient_attention_forward=efficient_forward,
        _efficient_attention_backward=efficient_backward,
    )


def from_definition():
    return make(exact_forward, exact_backward)


def cpu_flash():
    return make(cpu_flash_forward, cpu_flash_backward)
