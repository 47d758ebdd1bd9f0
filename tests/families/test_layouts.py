"""Checkpoints as their publishers lay them out, complete and incomplete. Shapes are small, weights random, names the real ones."""

import fnmatch
import json
import pickle
import shutil
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

import scfm
from scfm.errors import ModelFileError
from scfm.families import geneformer, scgpt
from scfm.models import CellTransformer, Model
from scfm.models.io import hub

IDS = {"V1": [f"ENSG{index:011d}" for index in range(40)], "V2": [f"ENSG{index:011d}" for index in range(20, 80)]}
SYMBOLS = [f"NAME{index}" for index in range(100)]  # of the Ensembl id with the same number
SPECIAL = {"V1": ("pad", "mask"), "V2": ("pad", "mask", "cls", "eos")}
FOLDERS = {"V1": "Geneformer-V1-10M", "V2": "Geneformer-V2-104M"}
SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "context_length": 64}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 41183536\n"


def geneformer_model(version):
    vocabulary = scfm.Vocabulary.from_genes(IDS[version], special=SPECIAL[version])
    preset = scfm.families.preset("geneformer-v1-10m" if version == "V1" else "geneformer-v2-104m")
    config = preset.model_config(n_tokens=len(vocabulary), pad_id=0, **SIZES)
    encoding = scfm.encoding.make_encoding(
        scfm.EncodingConfig(**{**preset.encoding, "context_length": 64}),
        vocabulary=vocabulary,
        medians=np.linspace(1, 2, len(vocabulary)),
    )
    torch.manual_seed(len(version))
    return Model(CellTransformer.for_vocabulary(config, vocabulary), encoding)


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


@pytest.fixture
def repository(tmp_path):
    """The files of the Geneformer repository: one folder for each model, and one for all dictionaries."""
    root = tmp_path / "hub" / "lab" / "Geneformer"
    for version, folder in FOLDERS.items():
        geneformer.write(geneformer_model(version), root / folder)
        shared = root / "geneformer" / ("gene_dictionaries_30m" if version == "V1" else "")
        tag = "gc30M" if version == "V1" else "gc104M"
        for name, ours in (("token_dictionary", "token_dictionary"), ("gene_median_dictionary", "median_dictionary")):
            file = root / folder / f"{ours}.json"
            dump(shared / f"{name}_{tag}.pkl", json.loads(file.read_text()))
            file.unlink()
        names = {SYMBOLS[index]: f"ENSG{index:011d}" for index in range(100)}
        dump(shared / f"gene_name_id_dict_{tag}.pkl", names)
    return root


def same_weights(model, version):
    ours, theirs = model.network.state_dict(), geneformer_model(version).network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("version", ["V1", "V2"])
@pytest.mark.parametrize("way", ["subfolder", "path"])
def test_dictionaries_are_found_in_the_repository_by_the_size_of_the_vocabulary(repository, version, way):
    folder = FOLDERS[version]
    model = scfm.load(repository, subfolder=folder) if way == "subfolder" else scfm.load(repository / folder)
    assert model.encoding.vocabulary.genes == tuple(IDS[version])
    assert same_weights(model, version)
    np.testing.assert_allclose(model.encoding.medians, geneformer_model(version).encoding.medians)


def test_symbols_work_with_a_model_of_ensembl_ids(repository):
    model = scfm.load(repository / FOLDERS["V2"])
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(2.0, (3, 60)).astype(np.float32))
    by_id = anndata.AnnData(counts, var=pd.DataFrame(index=IDS["V2"]))
    by_symbol = anndata.AnnData(counts.copy(), var=pd.DataFrame(index=SYMBOLS[20:80]))
    tokens = [scfm.pp.encode(cells, model).gene_ids_T for cells in (by_id, by_symbol)]
    assert torch.equal(*tokens)


def test_tables_of_genes_name_ensembl_ids_and_symbols(repository):
    """Symbols go in and come out: in each table, the number in the symbol is that in the id."""
    model = scfm.load(repository / FOLDERS["V2"])
    counts = sparse.csr_matrix(1 + np.random.default_rng(0).poisson(2.0, (12, 60)).astype(np.float32))
    cells = anndata.AnnData(counts, var=pd.DataFrame(index=SYMBOLS[20:80]))
    asked = ["NAME30", IDS["V2"][3], ["NAME40", "NAME41"], "name30"]
    effects = scfm.tl.perturb(cells, model, genes=asked, null_genes=["NAME50", "NAME51"], progress=False)
    assert effects["symbol"].to_dict() == {
        "NAME30": "NAME30", IDS["V2"][3]: "NAME23", "NAME40+NAME41": "NAME40+NAME41", "name30": "",
    }  # fmt: skip
    assert effects.loc["name30", "reason"].endswith("Did you mean 'NAME30'?")
    screened = scfm.tl.screen(cells, model, n_verify=2, n_check=2, progress=False)
    assert screened["symbol"].tolist() == [f"NAME{int(gene[4:])}" for gene in screened.index]
    others = scfm.tl.perturb(cells, model, genes=["NAME30"], effect_on="genes", progress=False)
    assert (others["symbol"] == "NAME30").all()
    assert others["affected_symbol"].tolist() == [f"NAME{int(gene[4:])}" for gene in others["affected"]]
    edges = scfm.tl.gene_network(cells, model, genes=["NAME30", IDS["V2"][3]], n_shuffles=2, progress=False)
    assert set(edges["source_symbol"]) == set(edges["target_symbol"]) == {"NAME30", "NAME23"}
    similar = scfm.tl.similar_genes(scfm.tl.gene_embeddings(cells, model), ["NAME30"], n_genes=2)
    assert similar["gene"].tolist() == [IDS["V2"][10]] * 2
    assert similar["similar_symbol"].tolist() == [f"NAME{int(gene[4:])}" for gene in similar["similar"]]
    labels = {f"NAME{index}": "even" if index % 2 == 0 else "odd" for index in range(20, 60)}
    scores = scfm.tl.classify_genes(None, labels, cells, model=model, n_folds=2, progress=False)
    assert scores.loc["majority class", "accuracy"] == pytest.approx(0.5)


def test_a_folder_serves_as_vocabulary_and_medians(repository, tmp_path):
    shutil.move(repository / FOLDERS["V1"], tmp_path / "alone")
    with pytest.raises(ModelFileError, match="has no vocabulary"):
        scfm.load(tmp_path / "alone")
    dictionaries = repository / "geneformer"
    for options in ({"vocabulary": dictionaries}, {"vocabulary": dictionaries, "medians": dictionaries}):
        assert same_weights(scfm.load(tmp_path / "alone", **options), "V1")
    file = dictionaries / "gene_dictionaries_30m" / "token_dictionary_gc30M.pkl"
    assert scfm.load(tmp_path / "alone", vocabulary=file).encoding.vocabulary.aliases["NAME3"] == IDS["V1"][3]


def test_dictionaries_of_another_version_are_refused(repository):
    shared = repository / "geneformer"
    with pytest.raises(ModelFileError, match=r"42 tokens, but .*gc104M.pkl has 64"):
        scfm.load(repository / FOLDERS["V1"], vocabulary=shared / "token_dictionary_gc104M.pkl")
    with pytest.raises(ModelFileError, match="no median for 20 of the 40 genes"):
        scfm.load(repository / FOLDERS["V1"], medians=shared / "gene_median_dictionary_gc104M.pkl")


def test_the_real_dictionaries_of_two_versions_are_told_from_each_other(scfm_data):
    from scfm.models.io.dictionaries import find_medians

    folder = scfm_data / "vocab"
    for tokens in ("gc30M", "gc95M"):
        vocabulary = scfm.encoding.read_vocabulary(folder / f"geneformer_token_dictionary_{tokens}.pkl")
        for medians in ("gc30M", "gc95M"):
            file = folder / f"geneformer_gene_median_dictionary_{medians}.pkl"
            if tokens == medians:
                assert not np.isnan(find_medians(folder, file, vocabulary)[vocabulary.gene_ids]).any()
            else:
                with pytest.raises(ModelFileError, match="another version"):
                    find_medians(folder, file, vocabulary)


def test_a_repository_of_several_models_lists_them(repository):
    with pytest.raises(ModelFileError, match="`subfolder=`: Geneformer-V1-10M, Geneformer-V2-104M"):
        scfm.load(repository)
    with pytest.raises(ModelFileError, match="has no Geneformer-V3; it contains Geneformer-V1-10M"):
        scfm.load(repository, subfolder="Geneformer-V3")


@pytest.fixture
def downloads(repository, tmp_path, monkeypatch):
    """Stands for the hub; returns what was fetched from it."""
    cache = tmp_path / "cache"

    def snapshot_download(name, *, revision, token, allow_patterns, ignore_patterns):
        source = repository.parents[1] / name
        for file in source.rglob("*"):
            path = file.relative_to(source).as_posix()
            wanted, refused = (
                any(fnmatch.fnmatch(path, each) for each in patterns) for patterns in (allow_patterns, ignore_patterns)
            )
            if file.is_file() and wanted and not refused:
                (cache / name / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name / path)
        return str(cache / name)

    monkeypatch.setattr(hub, "_client", lambda: SimpleNamespace(snapshot_download=snapshot_download))
    return lambda: sorted(file.relative_to(cache).as_posix() for file in cache.rglob("*") if file.is_file())


def test_a_model_of_the_hub_brings_its_own_files_and_the_dictionaries(repository, downloads):
    model = scfm.load("lab/Geneformer", subfolder=FOLDERS["V2"], revision="main")
    assert same_weights(model, "V2")
    found = downloads()
    assert "lab/Geneformer/Geneformer-V2-104M/model.safetensors" in found
    assert "lab/Geneformer/geneformer/gene_median_dictionary_gc104M.pkl" in found
    assert not [name for name in found if "V1-10M" in name]


def test_a_missing_folder_of_the_hub_is_named(downloads):
    with pytest.raises(ModelFileError, match="has no V9"):
        scfm.load("lab/Geneformer", subfolder="V9")


@pytest.fixture
def scgpt_folder(tmp_path):
    vocabulary = scfm.Vocabulary.from_genes([f"GENE{index}" for index in range(30)], special=("pad", "cls"))
    config = scfm.families.preset("scgpt-human").model_config(n_tokens=len(vocabulary), pad_id=0, **SIZES)
    encoding = scfm.encoding.make_encoding("bin", vocabulary=vocabulary)
    torch.manual_seed(0)
    model = Model(CellTransformer.for_vocabulary(config, vocabulary), encoding)
    scgpt.write(model, tmp_path / "scGPT_human")
    return tmp_path / "scGPT_human", model


def test_scgpts_folder_is_read_from_disk_and_from_the_hub(scgpt_folder, downloads, repository):
    folder, model = scgpt_folder
    shutil.copytree(folder, repository.parent / "scGPT")
    for loaded in (scfm.load(folder), scfm.load("lab/scGPT")):
        for name, tensor in model.network.state_dict().items():
            assert torch.equal(loaded.network.state_dict()[name], tensor), name


def test_a_model_of_the_hub_is_converted(scgpt_folder, downloads, repository, tmp_path):
    folder, _ = scgpt_folder
    shutil.copytree(folder, repository.parent / "scGPT")
    assert scfm.families.convert("lab/scGPT", tmp_path / "whole").id == scfm.load(folder).id
    converted = scfm.families.convert("lab/Geneformer", tmp_path / "part", subfolder=FOLDERS["V2"])
    assert same_weights(converted, "V2")
    assert scfm.load(tmp_path / "part").id == converted.id


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed_with_a_word(scgpt_folder, repository, prefix):
    folder, model = scgpt_folder
    state = torch.load(folder / "best_model.pt", weights_only=True)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, folder / "best_model.pt")
    with pytest.warns(UserWarning, match=f"prefix '{prefix}' was removed"):
        loaded = scfm.load(folder)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    weights = repository / FOLDERS["V1"] / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.warns(UserWarning, match=f"prefix '{prefix}' was removed"):
        assert same_weights(scfm.load(weights.parent), "V1")


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_which_nothing_fits_is_never_loaded_in_part(scgpt_folder, strict):
    folder, _ = scgpt_folder
    state = torch.load(folder / "best_model.pt", weights_only=True)
    torch.save({f"net.{name}": tensor for name, tensor in state.items()}, folder / "best_model.pt")
    with pytest.raises(ModelFileError, match="another model") as raised:
        scfm.load(folder, strict=strict)
    assert "strict" not in str(raised.value)


@pytest.mark.parametrize(
    "change", [{"embsize": 2**20}, {"nlayers": 900}, {"nlayers": 10**9}, {"nheads": "4"}, {"d_hid": 9}]
)
def test_settings_that_are_not_those_of_the_weights_are_refused_at_once(scgpt_folder, change):
    folder, _ = scgpt_folder
    arguments = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(arguments | change))
    with pytest.raises(ModelFileError):
        scfm.load(folder)


def test_weights_that_are_not_finite_are_refused(scgpt_folder):
    folder, _ = scgpt_folder
    state = torch.load(folder / "best_model.pt", weights_only=True)
    state["encoder.embedding.weight"][3, 3] = torch.nan
    torch.save(state, folder / "best_model.pt")
    with pytest.raises(ModelFileError, match="not finite"):
        scfm.load(folder)


@pytest.mark.parametrize("content", [POINTER, b""], ids=["lfs", "empty"])
def test_incomplete_downloads_are_named(scgpt_folder, repository, content):
    folder, _ = scgpt_folder
    dictionary = repository / "geneformer" / "token_dictionary_gc104M.pkl"
    for file in (folder / "best_model.pt", folder / "vocab.json", dictionary):
        saved = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ModelFileError, match=f"{file.name}.* (git-lfs|is empty)"):
            scfm.load(repository / FOLDERS["V2"] if file == dictionary else folder)
        file.write_bytes(saved)
    (folder / "best_model.pt").unlink()
    with pytest.raises(ModelFileError, match=r"none of best_model\.pt, model\.pt"):
        scfm.load(folder)
