import json

import numpy as np
import pytest

from scfm.errors import ModelFileError, VocabularyMismatchError
from scfm.vocab import Vocabulary, guess_id_type, strip_version


@pytest.fixture
def vocabulary():
    return Vocabulary.from_genes(["GAPDH", "ACTB", "CD3D"])


def test_specials_come_first_and_genes_keep_their_order(vocabulary):
    assert vocabulary.tokens == ("<pad>", "<mask>", "<cls>", "<eos>", "GAPDH", "ACTB", "CD3D")
    assert (vocabulary.pad_id, vocabulary.mask_id, vocabulary.cls_id, vocabulary.eos_id) == (0, 1, 2, 3)
    assert vocabulary.gene_ids.tolist() == [4, 5, 6]
    assert vocabulary.gene_ids.dtype == np.int32


def test_specials_may_stand_anywhere():
    vocabulary = Vocabulary(["A", "<pad>", "B"], special={"pad": "<pad>"})
    assert vocabulary.gene_ids.tolist() == [0, 2]
    assert vocabulary.pad_id == 1
    assert vocabulary.cls_id is None


def test_unknown_names_and_other_cases_are_minus_one(vocabulary):
    assert vocabulary.token_ids(["ACTB", "Actb", "actb", "XIST"]).tolist() == [5, -1, -1, -1]


def test_aliases_are_looked_up_after_tokens():
    vocabulary = Vocabulary(["A", "B"], aliases={"old": "B", "A": "B"})
    assert vocabulary.token_ids(["A", "old"]).tolist() == [0, 1]


def test_required_genes_that_are_missing_are_named(vocabulary):
    with pytest.raises(VocabularyMismatchError, match=r"'Cd3d'.*case-sensitive"):
        vocabulary.require(["GAPDH", "Cd3d"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": ["A", "A"]}, "'A' occurs more than once"),
        ({"tokens": ["A"], "special": {"pad": "<pad>"}}, "'<pad>'.*not among"),
        ({"tokens": ["A"], "aliases": {"B": "C"}}, "is for 'C'"),
        ({"tokens": ["A"], "id_type": "entrez"}, "must be one of"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(**arguments)


def test_json_gives_the_same_vocabulary_back(vocabulary, tmp_path):
    vocabulary.to_json(tmp_path / "vocabulary.json")
    again = Vocabulary.from_json(tmp_path / "vocabulary.json")
    assert again == vocabulary
    assert again.fingerprint == vocabulary.fingerprint
    assert hash(again) == hash(vocabulary)


def test_fingerprint_knows_order_and_roles():
    fingerprints = {
        Vocabulary(["A", "B"]).fingerprint,
        Vocabulary(["B", "A"]).fingerprint,
        Vocabulary(["A", "B"], special={"pad": "A"}).fingerprint,
    }
    assert len(fingerprints) == 3


@pytest.mark.parametrize("content", ["not json", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ModelFileError):
        Vocabulary.from_json(tmp_path / "v.json")


def test_saved_form_is_plain_json(vocabulary):
    assert json.loads(json.dumps(vocabulary.to_dict())) == vocabulary.to_dict()


@pytest.mark.parametrize(
    ("name", "stripped"),
    [("ENSG00000000003.15", "ENSG00000000003"), ("ENSMUSG00000000001.4", "ENSMUSG00000000001"),
     ("ENSG00000000003", "ENSG00000000003"), ("RP11-34P13.7", "RP11-34P13.7"), ("AC010970.1", "AC010970.1")],
)  # fmt: skip
def test_only_ensembl_ids_lose_their_version(name, stripped):
    assert strip_version(name) == stripped


def test_kind_of_names():
    assert guess_id_type(["ENSG00000000003", "ENSG00000000005.2", "X"]) == "ensembl"
    assert guess_id_type(["TP53", "MT-CO1"]) == "symbol"
    assert guess_id_type(["7157", "1", "2"]) == "other"
    assert guess_id_type([]) == "other"


def test_every_lookup_ignores_the_versions_of_ensembl_ids():
    bare, versioned, dotted = "ENSG00000019582", "ENSG00000019582.14", "RP11-34P13.7"
    for token in (bare, versioned):
        vocabulary = Vocabulary([token, dotted])
        names = [bare, versioned, "ENSG00000019582.3", dotted, "RP11-34P13"]
        assert vocabulary.token_ids(names).tolist() == [0, 0, 0, 1, -1]
        assert vocabulary.find(names)[0].tolist() == [0, 0, 0, 1, -1]
        assert vocabulary.find(names)[1] == 2
        assert vocabulary.require([versioned, bare]).tolist() == [0, 0]
    both = Vocabulary([versioned, bare])
    assert both.token_ids([versioned, bare]).tolist() == [0, 1]


def test_a_special_token_is_not_a_gene(vocabulary):
    assert vocabulary.token_ids(["<pad>"]).tolist() == [0]
    assert vocabulary.find(["<pad>", None, ""])[0].tolist() == [-1, -1, -1]
    with pytest.raises(VocabularyMismatchError, match="'<pad>'"):
        vocabulary.require(["<pad>"])
