"""Files that name their genes differently: brought together where `var` allows it, refused with counts where not."""

import pandas as pd
import pytest

from scfm.data.common_names import CommonNames
from scfm.errors import VocabularyMismatchError

SYMBOLS = ["CD74", "CST3", "GNLY", "NKG7"]
ENSEMBL = [f"ENSG0000000000{number}" for number in range(4)]


def var(index, **columns):
    return pd.DataFrame(columns, index=index)


def test_files_of_one_kind_stay_as_they_are():
    names = CommonNames.of_files([("a", var(SYMBOLS)), ("b", var(SYMBOLS[2:]))])
    assert (names.id_type, names.aliases) == ("symbol", {})
    assert names.of(var(SYMBOLS[2:])) == SYMBOLS[2:]


def test_a_column_of_the_other_kind_serves():
    files = [("a", var(SYMBOLS)), ("b", var(ENSEMBL, feature_name=SYMBOLS)), ("c", var(SYMBOLS))]
    names = CommonNames.of_files(files)
    assert names.id_type == "symbol"
    assert names.of(files[1][1]) == SYMBOLS
    assert names.aliases == dict(zip(ENSEMBL, SYMBOLS))


def test_a_file_without_the_column_is_translated_by_another_file():
    files = [("a", var(SYMBOLS, gene_ids=ENSEMBL)), ("b", var(SYMBOLS)), ("c", var([f"{name}.7" for name in ENSEMBL]))]
    names = CommonNames.of_files(files)
    assert names.id_type == "symbol"
    assert names.of(files[2][1]) == SYMBOLS


def test_names_without_a_translation_are_left_out_and_counted():
    files = [("a", var(SYMBOLS[:3], gene_ids=ENSEMBL[:3])), ("b", var(SYMBOLS)), ("c.h5ad", var(ENSEMBL))]
    with pytest.warns(UserWarning, match=r"c\.h5ad names genes by Ensembl ids.*3 of its 4 names can be translated"):
        names = CommonNames.of_files(files)
    assert names.of(files[2][1]) == [*SYMBOLS[:3], None]


def test_files_that_cannot_be_brought_together_are_refused_with_counts():
    files = [("a", var(SYMBOLS)), ("b", var(SYMBOLS)), ("c.h5ad", var(ENSEMBL))]
    with pytest.raises(
        VocabularyMismatchError, match=r"c\.h5ad .* 2 of 3 files by gene symbols; 0 of its 4.*'feature_name'"
    ):
        CommonNames.of_files(files)


def test_several_species_are_refused():
    files = [("a", var(["CD74", "CST3", "GNLY"])), ("b", var(["Cd74", "Cst3", "Gnly"]))]
    with pytest.raises(VocabularyMismatchError, match=r"2 species.*a \(human\), b \(mouse\)"):
        CommonNames.of_files(files)


def test_a_given_vocabulary_decides_the_kind():
    names = CommonNames.of_files([("a", var(SYMBOLS, gene_ids=ENSEMBL))], id_type="ensembl")
    assert names.of(var(SYMBOLS, gene_ids=ENSEMBL)) == ENSEMBL
