"""Models as the hub keeps them: one format, a card, and no code. The hub is a folder here."""

import fnmatch
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import scfm
from scfm.errors import ModelFileError
from scfm.models.io import hub


@pytest.fixture(scope="module")
def model():
    cells = scfm.datasets.pbmc()[:60].copy()
    return scfm.fit(
        cells,
        labels_key="bulk_labels",
        config=scfm.FitConfig(n_steps=1),
        pretrain_config=scfm.FitConfig(n_steps=1),
        progress=False,
    )


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Stands for huggingface_hub: repositories are folders below `remote`; calls are noted."""
    place, calls = tmp_path / "remote", []

    class HfApi:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repository, *, private, exist_ok):
            calls.append(("create", repository, private))
            (place / repository).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            calls.append(("commit", revision, commit_message))
            shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    def snapshot_download(repository, *, revision, token, allow_patterns, ignore_patterns):
        if not (place / repository).is_dir():
            raise OSError(f"404: {repository}\nmore words")
        cache = tmp_path / "cache" / repository
        cache.mkdir(parents=True, exist_ok=True)
        for file in (place / repository).rglob("*"):
            name = file.relative_to(place / repository).as_posix()
            wanted, refused = (
                any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
                for patterns in (allow_patterns, ignore_patterns)
            )
            if file.is_file() and wanted and not refused:
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(hub, "_client", lambda: SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download))
    return SimpleNamespace(place=place, calls=calls, cache=tmp_path / "cache")


def test_a_directory_is_the_format_of_save_with_a_card(model, tmp_path):
    model.save(tmp_path / "plain")
    model.save_pretrained(tmp_path / "shared")
    plain, shared = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("plain", "shared"))
    assert shared.pop("README.md")
    assert shared == plain
    assert scfm.load(tmp_path / "shared").id == model.id
    assert scfm.Model.from_pretrained(tmp_path / "plain").id == model.id
    model.save(tmp_path / "shared")  # still one of ours, so it may be replaced


def test_pushed_and_fetched_is_the_same_model(model, remote):
    address = model.push_to_hub("lab/blood", private=True, revision="v1", token="secret")
    assert address == "hub/lab/blood/commit/1"
    assert remote.calls == [
        ("token", "secret"),
        ("create", "lab/blood", True),
        ("commit", "v1", f"scfm model {model.id}"),
    ]
    assert scfm.Model.from_pretrained("lab/blood").id == model.id


def test_pickles_are_neither_fetched_nor_run(model, remote, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    model.push_to_hub("lab/blood")
    (remote.place / "lab/blood/vocabulary.pkl").write_bytes(pickle.dumps(Malicious()))
    (remote.place / "lab/blood/modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert scfm.Model.from_pretrained("lab/blood").id == model.id
    fetched = {path.name for path in (remote.cache / "lab/blood").iterdir()}
    assert not {name for name in fetched if name.endswith((".pkl", ".py"))}
    assert not (tmp_path / "ran").exists()


def test_the_card_says_what_the_model_knows_and_what_nobody_said(model, tmp_path):
    model.save_pretrained(tmp_path / "m", name="lab/blood", data="700 blood cells.", license="cc-by-4.0")
    card = (tmp_path / "m" / "README.md").read_text()
    yaml = pytest.importorskip("yaml")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "library_name": "scfm",
        "license": "cc-by-4.0",
        "tags": ["scfm", "single-cell", "transcriptomics", "anndata"],
    }
    assert 'from_pretrained("lab/blood")' in card
    assert "700 blood cells." in card
    assert "pretraining: objective `masked_genes`, 1 steps" in card
    for method, row in model.report().iterrows():
        assert f"| {method} | {row['accuracy']:.3f} | {row['macro_f1']:.3f} |" in card
    model.save_pretrained(tmp_path / "m")
    silent = (tmp_path / "m" / "README.md").read_text()
    assert "license:" not in silent
    assert silent.count("Not stated.") == 2  # data and license


def test_a_model_without_labels_has_a_card_without_scores(tmp_path):
    bare = scfm.fit(scfm.datasets.pbmc()[:30].copy(), config=scfm.FitConfig(n_steps=1), progress=False)
    bare.save_pretrained(tmp_path / "m")
    assert "fitted without labels" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [("no/such/folder", "'owner/name'"), ("nothing", "'owner/name'"), ("lab/none", "404: lab/none. Check the name")],
)
def test_what_is_not_there_is_named(remote, name, words):
    with pytest.raises(ModelFileError, match=words):
        scfm.Model.from_pretrained(name)


def test_without_the_client_its_installation_is_named(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="`pip install huggingface_hub`"):
        scfm.Model.from_pretrained("lab/blood")
    model.save_pretrained(tmp_path / "m")
    assert scfm.Model.from_pretrained(tmp_path / "m").id == model.id


def test_the_client_has_the_calls_that_are_made():
    """The fake above must not drift from the real one."""
    import inspect

    huggingface_hub = pytest.importorskip("huggingface_hub")
    wanted = {
        huggingface_hub.snapshot_download: {"revision", "token", "allow_patterns", "ignore_patterns"},
        huggingface_hub.HfApi.create_repo: {"private", "exist_ok"},
        huggingface_hub.HfApi.upload_folder: {"repo_id", "folder_path", "revision", "commit_message"},
        huggingface_hub.HfApi: {"token"},
    }
    for call, names in wanted.items():
        assert names <= set(inspect.signature(call).parameters)
    assert issubclass(huggingface_hub.errors.HfHubHTTPError, OSError)
    assert issubclass(huggingface_hub.errors.HFValidationError, ValueError)
