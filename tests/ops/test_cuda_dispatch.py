"""The choice of a kernel on a GPU, tested without one: fake CUDA tensors, and invented records of device tests."""

# Axes: T packed tokens, H heads, K head width.

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scfm import ops
from scfm.ops import backend, device_record
from scfm.ops.backend import choose_backend
from scfm.ops.device_record import Case, Passed, Run

HOPPER = (9, 0)
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture
def make_q():
    with FakeTensorMode():
        yield lambda dtype=torch.bfloat16, head_dim=64, **kw: torch.empty(
            6, 2, head_dim, dtype=dtype, device="cuda", **kw
        )


@pytest.fixture
def built(monkeypatch):
    """As if the CUDA kernels were built and the card were a Hopper."""
    monkeypatch.setattr(backend, "CUDA_PATH", "somewhere")
    monkeypatch.setattr(backend, "PROVEN", {})
    monkeypatch.setattr(backend, "capability_of", lambda device: HOPPER)
    monkeypatch.setattr(backend, "_WARNED", set())


def prove(monkeypatch, *, forward=1.2, training=1.1, capability=HOPPER, **case):
    case = Case(**{"dtype": "bfloat16", "head_dim": 64} | case)
    proof = Passed(case=case, error=0.8, speed_forward=forward, speed_training=training)
    monkeypatch.setattr(backend, "PROVEN", {(capability, case): proof})


def test_nothing_in_the_committed_record_is_used_unless_it_passed():
    for run in device_record.read_record():
        assert run.capability >= backend.CUDA_CAPABILITY
        assert all((run.card, run.torch, run.cuda, run.date, run.ran, run.kernels))
        for passed in run.passed:
            assert passed.error <= 1.0
            assert passed.case.dtype in backend.CUDA_DTYPES.values()
            assert passed.case.head_dim in backend.CUDA_HEAD_DIMS


@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources of the CUDA kernels")
def test_what_was_proven_are_the_kernels_of_today():
    """Otherwise `auto` would use kernels that never ran: measure again, or remove the runs from the record."""
    for run in device_record.read_record()[-1:]:
        assert run.kernels == device_record.kernel_sources(CSRC)


@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources of the CUDA kernels")
@pytest.mark.parametrize(
    "name", ["cuda/attention_forward.h", "cuda/attention_d64.cu", "cuda/attention.cpp", "checks.h"]
)
def test_a_record_is_void_after_any_change_of_the_kernels(tmp_path, name):
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("host"))
    before = device_record.kernel_sources(tmp_path / "csrc")
    assert before == device_record.kernel_sources(CSRC)
    with (tmp_path / "csrc" / name).open("a") as file:
        file.write("// a change\n")
    assert device_record.kernel_sources(tmp_path / "csrc") != before


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "expected"),
    [
        (torch.bfloat16, 64, (), "kernels"),
        (torch.float16, 40, ("generative",), "kernels"),
        (torch.bfloat16, 64, ("cross",), "kernels"),
        (torch.bfloat16, 64, ("key_bias",), "kernels"),
        (torch.float32, 64, (), "kernels"),
        (torch.bfloat16, 20, (), "kernels"),
        (torch.float64, 64, (), "torch"),
    ],
)
def test_without_a_record_auto_goes_to_torch(make_q, built, dtype, head_dim, options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", make_q(dtype, head_dim), options=frozenset(options)) == expected


def test_auto_uses_a_kernel_that_passed_and_was_faster(make_q, built, monkeypatch):
    prove(monkeypatch, forward=1.2, training=0.9, options=frozenset({"generative"}))
    generative = frozenset({"generative"})
    assert choose_backend("auto", make_q(), options=generative) == "fused"
    # Slower with its backward; another dtype, width, option set, operator: all unproven.
    assert choose_backend("auto", make_q(requires_grad=True), options=generative) == "kernels"
    with torch.no_grad():
        assert choose_backend("auto", make_q(requires_grad=True), options=generative) == "fused"
    assert choose_backend("auto", make_q(torch.float16), options=generative) == "kernels"
    assert choose_backend("auto", make_q(head_dim=32), options=generative) == "kernels"
    assert choose_backend("auto", make_q()) == "kernels"
    assert choose_backend("auto", make_q(), options=generative, operator="deletion_effects") == "torch"
    assert choose_backend("torch", make_q(), options=generative) == "torch"


def test_a_record_is_valid_for_its_compute_capability_only(make_q, built, monkeypatch):
    prove(monkeypatch, capability=(8, 0))
    assert choose_backend("auto", make_q()) == "kernels"
    monkeypatch.setattr(backend, "capability_of", lambda device: (8, 0))
    assert choose_backend("auto", make_q()) == "fused"


def test_a_case_without_a_measured_speed_is_not_used(make_q, built, monkeypatch):
    prove(monkeypatch, forward=None, training=None)
    assert choose_backend("auto", make_q()) == "kernels"


def test_forcing_an_unproven_kernel_warns_once(make_q, built, monkeypatch):
    with pytest.warns(UserWarning, match=r"attention in torch\.bfloat16 at head width 64, cross has not passed"):
        assert choose_backend("fused", make_q(), options=frozenset({"cross"})) == "fused"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("fused", make_q(), options=frozenset({"cross"})) == "fused"
        prove(monkeypatch)
        assert choose_backend("fused", make_q()) == "fused"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "message"),
    [
        (torch.float32, 64, HOPPER, r"no CUDA kernel for torch\.float32"),
        (torch.bfloat16, 48, HOPPER, "head width is 48, and the CUDA kernels support 32, 64 and 128"),
        (torch.bfloat16, 64, (7, 5), r"compute capability 7\.5, and the CUDA kernels need 8\.0"),
    ],
)
def test_forcing_an_unsupported_call_is_an_error_with_the_reason(
    make_q, built, monkeypatch, dtype, head_dim, capability, message
):
    monkeypatch.setattr(backend, "capability_of", lambda device: capability)
    with pytest.raises(RuntimeError, match=message):
        choose_backend("fused", make_q(dtype, head_dim))
    assert choose_backend("auto", make_q(dtype, head_dim)) in ("kernels", "torch")


def test_forcing_kernels_that_are_not_built_is_an_error_with_the_reason(make_q, monkeypatch):
    monkeypatch.setattr(backend, "CUDA_PATH", None)
    monkeypatch.setattr(backend, "CUDA_REASON", "not built: install with nvcc")
    with pytest.raises(RuntimeError, match="the CUDA kernels are not built: install with nvcc"):
        choose_backend("fused", make_q())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"n_known": torch.tensor([1, 2])}, {"cu_seqlens_k": torch.tensor([0, 2, 5])}])
def test_shapes_and_devices_of_a_call_on_a_gpu(dtype, options):
    """Fake tensors: `auto` goes through torch's route. (Autograd itself cannot run: its engine asks for a real GPU.)"""
    bounds = torch.tensor([0, 2, 6])
    n_keys = int(options.get("cu_seqlens_k", bounds)[-1])
    plan = ops.make_plan(bounds, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(n, 2, 64, dtype=dtype, device="cuda") for n in (6, n_keys, n_keys))
        out, lse = ops.attention(q, k, v, bounds, plan=plan, return_lse=True, **options)
        arguments = (bounds, plan.cu_seqlens_k, plan.n_known, None, 0.125, None, None)
        grads = torch.ops.scfm.kernel_attention_backward(out, lse, q, k, v, out, lse, *arguments)
    assert (out.device.type, out.dtype, out.shape) == ("cuda", dtype, q.shape)
    assert (lse.device.type, lse.dtype, lse.shape) == ("cuda", torch.float32, (6, 2))
    for found, tensor in zip(grads, (q, k, v)):
        assert (found.device.type, found.dtype, found.shape) == ("cuda", dtype, tensor.shape)


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(device_record.RECORD.read_text())
    before = device_record.read_record(path)
    case = Case(dtype="float16", head_dim=128, options=frozenset({"generative", "key_bias"}))
    runs = [
        Run(
            card="a card", capability=(9, 0), torch="2.13.0", cuda="13.0", date=date, ran="check", kernels="0123",
            passed=(Passed(case=case, error=0.7, speed_forward=speed),),
        )
        for date, speed in (("2030-01-01", 1.5), ("2030-01-02", 0.8))
    ]  # fmt: skip
    for run in runs:
        device_record.add_run(run, path)
    assert device_record.read_record(path) == (*before, *runs)
    latest = device_record.proven_cases(path)[(9, 0), case]
    assert latest.speed_forward == 0.8
    assert not latest.is_faster(training=False)
    assert "Nothing has run" not in path.read_text()


def test_runs_of_earlier_kernels_prove_nothing(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"about": "", "runs": []}')
    cases = [Case(dtype="bfloat16", head_dim=width) for width in (32, 64)]
    for case, kernels in zip(cases, ("0123", "4567")):
        run = Run(
            card="a card", capability=(9, 0), torch="2.13.0", cuda="13.0", date="2030-01-01", ran="check",
            kernels=kernels, passed=(Passed(case=case, error=0.7),),
        )  # fmt: skip
        device_record.add_run(run, path)
    assert list(device_record.proven_cases(path)) == [((9, 0), cases[1])]


def test_a_case_with_unknown_options_is_an_error():
    with pytest.raises(ValueError, match="'causal'"):
        Case(dtype="bfloat16", head_dim=64, options=frozenset({"causal"}))


def test_no_record_proves_nothing(tmp_path):
    assert device_record.proven_cases(tmp_path / "none.json") == {}
