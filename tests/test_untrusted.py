"""Pickles and torch files from elsewhere: refused before anything is built, however little of them is needed to do harm."""

import collections
import io
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint

import scfm
from scfm._untrusted import MAX_OPCODES, check_pickle, check_torch_file
from scfm.errors import ModelFileError
from scfm.models.io.tensors import read_torch
from scfm.train.checkpoints import META, SHARDS, Resumption, read_checkpoint

HARMFUL = {
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 3_000_000 + b"K\x01s.",
    "an index of the memo": b"\x80\x02K\x01r\xff\xff\xff\x03.",
    "a length": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "millions of dictionaries": b"\x80\x02](" + b"}" * (MAX_OPCODES + 10) + b"e.",
    "a function": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "nothing": b"",
    "an unbalanced stack": b"\x80\x020.",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_pickles_are_refused_with_a_sentence_and_little_memory(name, tmp_path):
    """In a process of its own: the fault would be a crash, or gigabytes."""
    for suffix in (".pkl", ".pt"):
        (tmp_path / f"tokens{suffix}").write_bytes(HARMFUL[name])
    script = """
import resource, sys
import torch, scfm.encoding, scfm.families
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read, path in ((scfm.encoding.read_vocabulary, "tokens.pkl"), (scfm.load, "tokens.pt")):
    try: read(path)
    except scfm.errors.ModelFileError as error: print(len(str(error)) > 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["True"] * 3), done.stderr


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol_pass(protocol):
    content = {"A": 1, "B": 2.5, "C": (1, 2), "D": [1, {"x": None}], "long": 2**70, **{f"G{i}": i for i in range(3000)}}
    check_pickle(pickle.dumps(content, protocol), "it")
    numbers = {f"G{i}": np.float64(i) for i in range(10)}
    check_pickle(pickle.dumps(numbers, protocol), "it") if protocol >= 2 else None


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_files_of_torch_pass(tmp_path, options):
    state = collections.OrderedDict(
        a=torch.arange(3.0), b=torch.nn.Parameter(torch.ones(2, 2)), c=torch.ones(2).bfloat16()
    )
    torch.save({"model_state_dict": state, "config": {"x": [1, (2, {"y": None})]}}, tmp_path / "a.pt", **options)
    content = read_torch(tmp_path / "a.pt")
    assert torch.equal(content["model_state_dict"]["a"], state["a"])


def test_members_larger_than_the_archive_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelFileError, match="larger than the file"):
        check_torch_file(tmp_path / "bomb.pt")


def test_every_truncation_is_an_error_with_a_sentence(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model_state_dict": {"a": torch.zeros(100)}}, buffer)
    content = buffer.getvalue()
    for length in range(0, len(content), max(1, len(content) // 60)):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            scfm.load(tmp_path / "cut.pt")
    pickled = pickle.dumps({f"GENE{i}": i for i in range(50)})
    for length in range(len(pickled)):
        (tmp_path / "cut.pkl").write_bytes(pickled[:length])
        with pytest.raises(ModelFileError):
            scfm.encoding.read_vocabulary(tmp_path / "cut.pkl")


@pytest.mark.parametrize(
    "harm",
    [
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.",
        b"\x80\x04\x8c)torch.distributed.checkpoint.filesystem\x8c\tos.system\x93\x8c\x0ctouch harmed\x85R.",
        b"",
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_runs_no_code(harm, tmp_path, monkeypatch):
    """torch unpickles the list of shards without restrictions."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoints" / "step=1.ckpt"
    distributed_checkpoint.save({"state_dict": {"a": torch.zeros(3).bfloat16()}}, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 1, "n_lanes": 1}, path / META)
    assert Resumption.newest(tmp_path / "run") == Resumption(path, 1, 1)
    (path / SHARDS).write_bytes(harm)
    with pytest.raises(ModelFileError, match=r"step=1.ckpt is cut short or damaged, or scfm did not write it"):
        read_checkpoint(path)
    assert Resumption.newest(tmp_path / "run") is None
    assert not (tmp_path / "harmed").exists()
