"""Saved models: their files belong together, or are refused with a sentence; a model under a name is never half there."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import scfm
from scfm.encoding import EncodingConfig, make_encoding
from scfm.errors import ModelFileError
from scfm.models import CellTransformer, Model, ModelConfig
from scfm.models.io.layout import FORMAT_VERSION
from scfm.models.state import Calibration
from scfm.nn import ClassHeadConfig

LABELS = ("alpha", "beta", "gamma")


def make_model(seed=0, **changes):
    vocabulary = scfm.Vocabulary.from_genes([f"GENE{index}" for index in range(30)], special=("pad", "mask"))
    medians = np.linspace(1, 3, len(vocabulary))
    encoding = make_encoding(EncodingConfig(kind="rank", context_length=64), vocabulary=vocabulary, medians=medians)
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "context_length": 64}
    config = ModelConfig(n_tokens=len(vocabulary), classes=ClassHeadConfig(n_classes=3, gene_classifier=True), **sizes)
    network = CellTransformer.for_vocabulary(config, vocabulary)
    state = {"calibration": Calibration(n_cells=9, transformer_temperature=1.5), "labels": LABELS}
    return Model(network, encoding, **{**state, **changes})


@pytest.fixture
def folder(tmp_path):
    make_model().save(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def edit_bytes(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def flip_bit(content):
    content[-103] ^= 0x40


def fill_with_nan(content):
    content[-400:] = b"\xff\xff\xff\x7f" * 100


def test_everything_that_is_saved_comes_back(folder):
    model, loaded = make_model(), scfm.load(folder)
    assert loaded.id == model.id
    assert (loaded.labels, loaded.calibration) == (model.labels, model.calibration)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    assert loaded.network.config == model.network.config


def of_another(name):
    def change(folder):
        make_model(seed=1).save(folder.with_name("other"))
        shutil.copy(folder.with_name("other") / name, folder)

    return change


def reverse_medians(folder):
    medians = load_arrays(folder / "encoding.safetensors")["medians"]
    save_arrays({"medians": medians[::-1].copy()}, folder / "encoding.safetensors")


def another_vocabulary(folder):
    content = json.loads((folder / "vocabulary.json").read_text())
    content["tokens"][5], content["tokens"][6] = content["tokens"][6], content["tokens"][5]
    (folder / "vocabulary.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: edit_bytes(folder / "weights.safetensors", flip_bit), "weights.safetensors is not the file"),
        (of_another("weights.safetensors"), "weights.safetensors is not the file"),
        (reverse_medians, "encoding.safetensors is not the file"),
        (another_vocabulary, "vocabulary.json is not the file"),
        (lambda folder: edit_config(folder, lambda c: c["labels"].reverse()), "config.json is not the file"),
        (lambda folder: edit_config(folder, lambda c: c["labels"].append("more")), "4 labels for 3 classes"),
        (
            lambda folder: edit_config(folder, lambda c: c["calibration"].update(transformer_temperature=2.0)),
            "config.json is not the file",
        ),
        (lambda folder: edit_config(folder, lambda c: c["encoding"].update(seed=5)), "config.json is not the file"),
        (lambda folder: edit_bytes(folder / "weights.safetensors", fill_with_nan), "not finite"),
        (lambda folder: (folder / "encoding.safetensors").unlink(), "encoding.safetensors is missing"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors"),
        (lambda folder: edit_config(folder, lambda c: c.pop("files")), "does not list the files"),
        (lambda folder: edit_config(folder, lambda c: c.pop("network")), "no entry 'network'"),
        (lambda folder: edit_config(folder, lambda c: c.update(format_version="2")), "format version '2'"),
        (
            lambda folder: edit_config(folder, lambda c: c.update(format_version=FORMAT_VERSION + 1)),
            f"reads up to {FORMAT_VERSION}",
        ),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"format": "scfm", "format_ver'), "not valid JSON"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(folder, damage, words):
    damage(folder)
    with pytest.raises(ModelFileError, match=words):
        scfm.load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "vocabulary.json", "encoding.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 41183536\n"],
    ids=["empty", "lfs"],
)
def test_incomplete_downloads_are_refused(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=name):
        scfm.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9}, {"n_layers": 900}, {"d_model": 10**9}, {"d_model": 999_936}, {"n_tokens": 10**9},
        {"d_ff": 900_000}, {"context_length": 90_000_000}, {"n_layers": -1}, {"n_layers": "2"}, {"n_layers": None},
        {"dropout": "much"}, {"d_model": 16.5}, {"norm": "sideways"}, {"classes": {"n_classes": 10**9}}, {"classes": 3},
        {"attention": {"kind": "linear", "n_random_features": 10**9}}, {"n_heads": True}, {"new_field": 1},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_settings_are_refused_before_anything_is_allocated(folder, change):
    edit_config(folder, lambda content: content["network"].update(change))
    with pytest.raises(ModelFileError):
        scfm.load(folder)


def test_the_id_covers_everything_that_changes_an_output():
    def with_vocabulary(**changes):
        model = make_model()
        old = model.encoding.vocabulary
        vocabulary = scfm.Vocabulary(old.tokens, **{"special": old.special, **changes})
        encoding = make_encoding(model.encoding.config, vocabulary=vocabulary, medians=model.encoding.medians)
        return Model(model.network, encoding, labels=model.labels, calibration=model.calibration)

    def with_medians():
        model = make_model()
        encoding = make_encoding(
            model.encoding.config, vocabulary=model.encoding.vocabulary, medians=model.encoding.medians[::-1]
        )
        return Model(model.network, encoding, labels=model.labels, calibration=model.calibration)

    def with_tensor(name):
        model = make_model()
        with torch.no_grad():
            model.network.state_dict()[name].view(-1)[-1] += 1
        return model

    def with_encoding(**changes):
        model = make_model()
        return Model(
            model.network, model.encoding.replace(**changes), labels=model.labels, calibration=model.calibration
        )

    plain = make_model()
    others = [
        make_model(labels=LABELS[::-1]),
        make_model(calibration=Calibration(n_cells=9, transformer_temperature=1.6)),
        make_model(calibration=Calibration(n_cells=9, transformer_temperature=1.5, novelty_threshold=2.0)),
        make_model(calibration=None),
        with_vocabulary(aliases={"OLD": "GENE3"}),
        with_medians(),
        with_tensor("blocks.0.attention.qkv.bias"),
        with_tensor("gene_classifier.ensemble_weights"),
        with_tensor("gene_classifier.bias_C"),
        with_tensor("class_head.norm.running_var"),
        with_encoding(context_length=32),
        with_encoding(duplicates="sum"),
    ]
    ids = [model.id for model in (plain, *others)]
    assert len(set(ids)) == len(ids)
    assert make_model(history={"a": 1}, scores=[{"method": "scfm"}]).id == plain.id


def test_a_model_can_be_pickled_and_copied():
    model = make_model()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.id == model.id
        assert other.encoding.vocabulary == model.encoding.vocabulary
        with torch.no_grad():
            other.network.embedding.gene.weight.add_(1)
        assert other.id != model.id
    assert model.id == make_model().id


def test_a_diverged_model_is_not_saved(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.network.blocks[0].attention.out.weight[0, 0] = torch.nan
    with pytest.raises(ModelFileError, match=r"blocks\.0\.attention\.out\.weight"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_files as t
import scfm.models.io.save as save
folder, when = sys.argv[1], sys.argv[2]
model = t.make_model(seed=1)
if when == "during":
    write = save.write_files
    save.write_files = lambda model, path, **settings: (write(model, path, **settings), (path / "config.json").unlink(), os.kill(os.getpid(), signal.SIGKILL))
else:
    import scfm._files as files
    move = files._exchange
    files._exchange = lambda *paths: (move(*paths), os.kill(os.getpid(), signal.SIGKILL))
model.save(folder)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges names by a system call of Linux")
@pytest.mark.parametrize(("when", "seed"), [("during", 0), ("after", 1)])
def test_a_killed_save_leaves_the_old_or_the_new_model_and_no_rest_for_the_next(folder, when, seed):
    script = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, str(folder), when], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert scfm.load(folder).id == make_model(seed=seed).id
    assert len(list(folder.parent.iterdir())) == 2
    make_model().save(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert scfm.load(folder).id == make_model().id


def test_every_tensor_is_named_that_does_not_fit(folder):
    state = load_file(folder / "weights.safetensors")
    state["extra"] = torch.ones(2)
    state["norm.weight"] = state.pop("embedding.norm.weight")
    state["gene_head.bias"] = torch.ones(5)
    save_file(state, folder / "weights.safetensors")
    with pytest.raises(ModelFileError) as raised:
        scfm.load(folder)
    for words in (
        "unknown: extra",
        "unknown: norm.weight",
        "missing: embedding.norm.weight",
        "shape: gene_head.bias is (5,)",
    ):
        assert words in str(raised.value)


def test_bfloat16_halves_the_file_and_keeps_the_values_that_it_holds(tmp_path):
    model = make_model()
    model.save(tmp_path / "full")
    model.save(tmp_path / "half", precision="bf16")
    loaded = scfm.load(tmp_path / "half")
    for name, tensor in loaded.network.state_dict().items():
        original = model.network.state_dict()[name]
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor, original.bfloat16().float() if original.dim() > 1 else original), name
    loaded.save(tmp_path / "again", precision="bf16")
    assert scfm.load(tmp_path / "again").id == loaded.id != model.id
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.75 * sizes[1]
    with pytest.raises(ValueError, match="choose one of fp32, bf16"):
        model.save(tmp_path / "none", precision="int8")
