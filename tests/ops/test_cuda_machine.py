"""The emulated machine: it computes what a GPU computes, and reports every fault of a kernel."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_machine as machine
import pytest
import torch

pytestmark = pytest.mark.skipif(not machine.AVAILABLE, reason=machine.NEEDS)

FAULTS = {
    "no wait": "meets an asynchronous copy that was not waited for",
    "no barrier": "race, another thread wrote this word",
    "never written": "a word is read that was never written",
    "past the end": "a write is out of bounds",
    "read only": "a write is out of bounds",
    "one word, many threads": "a word is written twice",
    "shared past the end": "shared memory: an access is out of bounds",
    "shared off alignment": "shared memory: an access is off its alignment",
    "overwritten": "race, another thread read this word",
    "missing at a barrier": "deadlock",
    "missing at a shuffle": "deadlock",
    "lanes apart": "lanes of a warp are at different operations",
    "copy never waited for": "ends with an asynchronous copy under way",
    "global off alignment": "global memory: an access is off its alignment",
    "another thread's word": "a word is read that another thread writes",
    "written and added to": "a word is both written and added to",
    "same banks": "two rows of a matrix load are in the same banks",
}


@pytest.fixture(scope="module")
def library():
    source = Path(__file__).with_name("cuda_faults.cpp")
    built = machine.build((str(source), "cuda/emulate/fibers.cpp", "cuda/emulate/machine.cpp"))
    library = ctypes.CDLL(str(built))
    for function in (library.run_kernel, library.run_order, library.run_product):
        function.restype = ctypes.c_char_p
    library.output_of.restype = ctypes.c_float
    return library


@pytest.fixture(params=[None, 0, 1, 2], ids=["in order", "order 0", "order 1", "order 2"])
def order(request, monkeypatch):
    """Threads take turns by number, or as drawn."""
    if request.param is not None:
        monkeypatch.setenv("SCFM_EMULATE_SEED", str(request.param))
    return request.param


def test_tensors_reach_the_gpu_as_they_lie():
    """Packed views, a bias of stride 0 and storage off the raster, which `.cuda()` would make dense."""
    packed = torch.arange(120.0)[2:].view(-1)[:108].view(6, 3, 2, 3)
    for tensor in (*packed.unbind(1), torch.arange(5.0)[1:, None].expand(4, 2), torch.randn(4, 6).T):
        moved = machine.moved_as_it_lies(tensor, "cpu")
        assert torch.equal(moved, tensor)
        assert (moved.stride(), moved.storage_offset()) == (tensor.stride(), tensor.storage_offset())
        assert moved.data_ptr() != tensor.data_ptr()


def test_a_kernel_without_a_fault_runs(library, order):
    assert library.run_kernel(0) is None
    assert [library.output_of(i) for i in range(64)] == [max(i - 1, 0) for i in range(64)]


@pytest.mark.parametrize(("index", "complaint"), list(enumerate(FAULTS.values(), 1)), ids=FAULTS.keys())
def test_a_fault_is_named(library, index, complaint, order):
    found = library.run_kernel(index)
    assert found is not None
    # In another order the same fault can show first by another rule.
    assert order is not None or complaint in found.decode()


def test_drawn_turns_differ_and_come_again(library, monkeypatch):
    """The last thread that adds to a word reads how many came before; which one that is depends on the order alone."""

    def finishers(seed):
        monkeypatch.setenv("SCFM_EMULATE_SEED", str(seed))
        assert library.run_order() is None
        return [library.output_of(i) for i in range(64)]

    drawn = [finishers(seed) for seed in range(4)]
    assert finishers(2) == drawn[2]
    assert len({tuple(turns) for turns in drawn}) == 4
    for turns in drawn:
        assert sorted(turns) == list(range(64))


def test_fragments_make_up_a_product(library):
    """Matrix loads and the product, each with its layout written out on its own, fit together as on a GPU."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (16, 16), generator=generator).bfloat16()
    b = torch.randint(-8, 9, (16, 8), generator=generator).bfloat16()
    c = torch.full((16, 8), torch.nan)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c)]
    assert library.run_product(*pointers) is None
    assert torch.equal(c, a.float() @ b.float())


MUTANTS = {
    "no barrier in the forward": ("attention_forward.h", "    barrier();\n", ""),
    "no barrier in the deterministic backward": ("attention_backward_queries.h", "    barrier();\n", ""),
    "no barrier in the key sums": ("attention_keys.h", "    barrier();\n", ""),
    "no wait in the forward": ("attention_forward.h", "    copies_wait();\n", ""),
    "the buffer in use is filled": ("attention_forward.h", "(~block & 1)", "(block & 1)"),
    "no barrier before dQ": ("attention_backward.h", "      barrier();\n", ""),
    "rows past the end are read": ("tiles.h", "const bool valid = row < n_valid;\n    copy_chunk", "const bool valid = row < n_valid || n_valid > 0;\n    copy_chunk"),
    "the last block is not masked": ("attention_forward.h", "if (n_valid < Shape::kKeys) {", "if (false) {"),
    "queries past the end count": ("attention_backward.h", "if (n_valid < Shape::kQueries) {", "if (false) {"),
    "keys past the end count": ("attention_backward.h", "Pair bias{-kInfinity, -kInfinity};", "Pair bias{0.f, 0.f};"),
    "own key without bias": ("attention_forward.h", "scalar_or_zero(problem.key_bias, token, work.head) * kLog2E);\n  const float before", "0.f);\n  const float before"),
    "rows not swizzled": ("tiles.h", "chunk ^ (row & 7)", "chunk + 0 * row"),
    "log 2 for ln": ("attention_forward.h", "log2_fast(sum)) * kLn2", "log2_fast(sum))"),
    "scale applied twice": ("attention_backward.h", "grad_k, problem.scale * undo", "grad_k, problem.scale * problem.scale * undo"),
    "swapped halves of a pair": ("tiles.h", "words[1] = pack<Element>(first[2], first[3]);", "words[1] = pack<Element>(first[3], first[2]);"),
    "float16 gradients unscaled": ("attention_rows.h", "exponent > -100.f && exponent < 100.f", "exponent > 200.f"),
    "32-bit offsets": ("tiles.h", "2 * (token * tokens.token_stride", "2 * (int32_t)(token * tokens.token_stride"),
    "grad_lse is forgotten": ("attention_rows.h", "delta -= scalar_or_zero(problem.grad_lse, token, work.head);", "delta -= 0.f;"),
    "empty rows are not": ("attention_rows.h", "natural == -kInfinity ? kInfinity : natural * kLog2E", "natural * kLog2E"),
}  # fmt: skip


@pytest.mark.slow  # half a minute each: the kernels are built anew
@pytest.mark.skipif("SCFM_TEST_MUTANTS" not in os.environ, reason="takes fifteen minutes: SCFM_TEST_MUTANTS=1 runs it")
@pytest.mark.parametrize(("name", "before", "after"), MUTANTS.values(), ids=MUTANTS.keys())
def test_a_kernel_with_a_fault_fails_its_tests(tmp_path, name, before, after):
    """What test_cuda_kernels.py is worth: every fault planted in the kernels' sources must make it fail."""
    here, root = Path(__file__).parent, machine.CSRC.parent
    for folder in ("csrc/cuda", "csrc/cpu"):
        shutil.copytree(root / folder, tmp_path / folder)
    shutil.copy(root / "csrc/checks.h", tmp_path / "csrc")
    shutil.copytree(here, tmp_path / "tests/ops", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "csrc/cuda" / name
    source = path.read_text()
    assert before in source
    path.write_text(source.replace(before, after))
    machine.build_operators(tmp_path / "csrc")  # a fault that does not compile would prove nothing
    chosen = "(plain or generative or past or head or range or no_key or billion or number) and not opcheck and not 128"
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    run += ["--import-mode=importlib", "-c", str(root / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*run, str(tmp_path / "tests/ops/test_cuda_kernels.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "AssertionError" in done.stdout or "a CUDA kernel could not run" in done.stdout, done.stdout[-2000:]
    print(*[line for line in done.stdout.splitlines() if line.startswith("FAILED")])  # noqa: T201 (pytest -rP: killed by)
