import json
import os
import pickle

import numpy as np
import pytest

from scfm.encoding import read_aliases, read_medians, read_vocabulary
from scfm.errors import ModelFileError


def dump(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpy_numbers_come_out_as_numbers(tmp_path, protocol):
    kinds = [np.int16, np.int64, np.uint8, np.float32, np.float64]
    table = {f"g{place}": kind(place) for place, kind in enumerate(kinds)}
    vocabulary = read_vocabulary(dump(tmp_path / "ids.pkl", table, protocol))
    assert vocabulary.tokens == ("g0", "g1", "g2", "g3", "g4")
    medians = read_medians(dump(tmp_path / "medians.pkl", table, protocol), vocabulary)
    np.testing.assert_array_equal(medians, np.arange(5.0))


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "touch {marker}"),
        Attack(eval, "open('{marker}', 'w')"),
        Attack(np.load, "x"),
        Attack(getattr, "x", "format"),
        Attack(np.dtype, "O"),
        Attack(np.dtype, [("f", "O")]),
        np.zeros(3),
        np.array({"a": 1}, dtype=object),
    ],
)
def test_anything_else_is_refused_and_not_run(tmp_path, attack, protocol):
    marker = tmp_path / "ran"
    if isinstance(attack, Attack):
        function, arguments = attack.call
        attack = Attack(function, *(a.format(marker=marker) if isinstance(a, str) else a for a in arguments))
    path = dump(tmp_path / "bad.pkl", {"gene": attack}, protocol)
    with pytest.raises(ModelFileError, match=r"bad\.pkl"):
        read_vocabulary(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps({"a": 0})[:-3], pickle.dumps(["a"]), pickle.dumps({1: 2})]
)
def test_damaged_pickles_are_refused(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"bad\.pkl"):
        read_vocabulary(tmp_path / "bad.pkl")


def test_ids_with_gaps_or_twice_are_refused(tmp_path):
    for table in ({"a": 0, "b": 2}, {"a": 0, "b": 0}, {"a": 1}, {}, {"a": "x"}):
        path = tmp_path / "ids.json"
        path.write_text(json.dumps(table))
        with pytest.raises(ModelFileError):
            read_vocabulary(path)


def test_tables_are_read(tmp_path):
    path = tmp_path / "genes.tsv"
    path.write_text("gene\tid\tmedian\n<pad>\t0\t\nB\t2\t1.5\nA\t1\t\n")
    vocabulary = read_vocabulary(path, add_special=["mask"])
    assert vocabulary.tokens == ("<pad>", "A", "B", "<mask>")
    assert (vocabulary.pad_id, vocabulary.mask_id) == (0, 3)
    np.testing.assert_array_equal(read_medians(path, vocabulary), [np.nan, np.nan, 1.5, np.nan])
    (tmp_path / "names.csv").write_text("A,alpha\nB,A\nC,gamma\n")
    assert read_aliases(tmp_path / "names.csv", vocabulary) == {"alpha": "A"}
    with pytest.raises(ModelFileError, match="not supported"):
        read_vocabulary(tmp_path / "genes.xlsx")
    (tmp_path / "none.tsv").write_text("gene\tid\nA\t0\n")
    with pytest.raises(ModelFileError, match="no column 'median'"):
        read_medians(tmp_path / "none.tsv", vocabulary)


def test_published_pickles_equal_their_lossless_text(scfm_data):
    folder = scfm_data / "vocab"
    for corpus in ("gc30M", "gc95M"):
        pickled = read_vocabulary(folder / f"geneformer_token_dictionary_{corpus}.pkl")
        text = folder / f"geneformer_{corpus}_tokens_medians.tsv"
        assert pickled == read_vocabulary(text)
        np.testing.assert_array_equal(
            read_medians(folder / f"geneformer_gene_median_dictionary_{corpus}.pkl", pickled),
            read_medians(text, pickled),
        )
    assert len(pickled) == 20275
    assert (pickled.pad_id, pickled.mask_id, pickled.cls_id, pickled.eos_id) == (0, 1, 2, 3)


def test_scgpts_vocabulary_has_its_specials_last(scfm_data):
    vocabulary = read_vocabulary(scfm_data / "vocab" / "scgpt_human_finetuned_model_vocab.json")
    assert len(vocabulary) == 60697
    assert (vocabulary.pad_id, vocabulary.cls_id, vocabulary.eos_id) == (60694, 60695, 60696)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("v.json", b'{"a": 0.7, "b": 1.9}', "0.7 is not a whole number"),
        ("v.json", b'{"a": true, "b": false}', "True is not a whole number"),
        ("v.json", b'{"a": 0, "a": 1, "b": 0}', "the entry 'a' twice, with 0 and 1"),
        ("v.json", b'{"a": Infinity}', "does not map tokens to whole numbers"),
        ("v.json", b'{"format_version": 1}', "no entry 'tokens'"),
        ("v.json", b'{"a":' * 100_000 + b"0" + b"}" * 100_000, "is not JSON"),
        ("v.tsv", b"gene\tid\na\t0\na\t1\nb\t0\n", "the entry 'a' twice"),
        ("v.tsv", b"gene\tid\na\t0.5\n", "does not map tokens to whole numbers"),
        ("v.tsv", b"gene\tid\n\xff\t0\n", "is not a table in UTF-8"),
    ],
)
def test_tables_that_do_not_number_the_tokens_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        read_vocabulary(tmp_path / name)
