"""What no emulated machine shows of the CUDA operators: streams, graphs, the life of the tile lists, several devices."""

# Axes: T packed tokens, H heads, K head width.

import pytest
import torch

pytestmark = pytest.mark.gpu


def draw(lengths, device="cuda", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    shape = (3, sum(lengths), 2, 64)
    tensors = torch.randn(shape, generator=generator, device=device).bfloat16()
    return *tensors, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def attention(q, k, v, cu_seqlens):
    return torch.ops.scfm.attention_forward(q, k, v, cu_seqlens, None, None, None, 0.125)


def test_a_cuda_graph_is_an_error_with_the_reason_and_leaves_the_device_usable():
    problem = draw([70, 130])
    expected = attention(*problem)
    fresh = draw([131, 69])  # a list of tiles that is not there yet
    for tensors in (problem, fresh):
        with pytest.raises(RuntimeError, match="CUDA graphs cannot hold it"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            attention(*tensors)
    torch.cuda.synchronize()
    assert torch.equal(attention(*problem)[0], expected[0])


def test_streams_side_by_side():
    """Each stream has its own copy of the tile list, so that none is read before it has arrived."""
    problems = [draw([500 + 10 * i, 300], seed=i) for i in range(4)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in problems], []
    for _ in range(3):
        for stream, problem in zip(streams, problems):
            with torch.cuda.stream(stream):
                found.append(attention(*problem)[0])
    torch.cuda.synchronize()
    for i, out in enumerate(found):
        assert torch.equal(out, attention(*problems[i % 4])[0]), i


def test_more_batches_than_tile_lists_are_kept():
    """Lists that are dropped while kernels are under way must not be overwritten under them."""
    problems = [draw([900 + i, 1100 - i, 3], seed=i) for i in range(40)]
    found = [attention(*problem)[0] for problem in problems]
    torch.cuda.synchronize()
    for problem, out in zip(problems, found):
        assert torch.equal(out, attention(*problem)[0])
        torch.cuda.synchronize()


def test_a_grid_beyond_65_535():
    lengths = [1] * 70_000
    q, k, v, cu_seqlens = draw(lengths)
    assert torch.equal(attention(q, k, v, cu_seqlens)[0], v)  # each token sees itself alone


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_counts_and_not_the_current_one():
    first, second = (draw([70, 130], f"cuda:{i}") for i in range(2))
    torch.cuda.set_device(0)
    out, _ = attention(*second)
    assert out.device.index == 1
    assert torch.cuda.current_device() == 0
    assert torch.equal(out.cpu(), attention(*(t.to("cuda:1") for t in first[:3]), first[3])[0].cpu())
