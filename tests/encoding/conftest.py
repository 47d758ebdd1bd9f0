"""Oracles: each encoding written again, from its specification, in plain Python over one cell at a time."""

import math

import numpy as np
import pytest

from scfm.vocab import Vocabulary

MASK = (1 << 64) - 1


def _mix(state):
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def unit(seed, first, second):
    """The number in [0, 1) that the hash of three integers gives."""
    return (_mix(_mix(_mix(seed) ^ first) ^ second) >> 11) * 2.0**-53


class Oracle:
    """Slow encoders. A cell is a dictionary from token id to count; results are lists of (token id, value)."""

    @staticmethod
    def cell(row, names, vocabulary):
        """A row of a dense matrix as a dictionary; columns of one gene are summed."""
        counts = {}
        for name, count in zip(names, row):
            place = int(vocabulary.token_ids([name])[0])
            if place >= 0 and count != 0:
                counts[place] = counts.get(place, 0.0) + float(count)
        return counts

    @staticmethod
    def rank(counts, medians, context, *, cls=None, eos=None):
        room = context - (cls is not None) - (eos is not None)
        scored = [(-count / medians[token], token) for token, count in counts.items() if not math.isnan(medians[token])]
        tokens = [token for _, token in sorted(scored)][:room]
        return [cls] * (cls is not None) + tokens + [eos] * (eos is not None)

    @staticmethod
    def bin(counts, *, n_bins, seed, context, cls, cls_value=-2.0, zeros=(), log1p=False, target_sum=None, depth=None):
        values = {token: count if target_sum is None else count / depth * target_sum for token, count in counts.items()}
        if log1p:
            values = {token: float(np.log1p(value)) for token, value in values.items()}
        binned = dict.fromkeys(zeros, 0.0)
        if values:
            x = np.array(list(values.values()))
            edges = np.quantile(x, np.linspace(0, 1, n_bins - 1))
            left = np.digitize(x, edges)
            right = np.digitize(x, edges, right=True)
            for token, low, high in zip(values, right, left):
                binned[token] = math.ceil(unit(seed, 1, token) * (low - high) + high)
        room = context - 1
        kept = sorted(binned, key=lambda token: (-counts.get(token, 0.0), token))[:room]
        return [(cls, cls_value)] + [(token, float(binned[token])) for token in sorted(kept)]

    @staticmethod
    def bucket(counts, *, genes, eos, n_buckets=6):
        total = sum(counts.values())
        row = []
        for token in genes:
            value = counts.get(token, 0.0) / total * 1e4 if total else 0.0
            row.append((token, float(min(math.floor(math.log2(1 + value)), n_buckets - 1))))
        return [*row, (eos, 0.0)]

    @staticmethod
    def continuous(counts, *, target, source, target_depth=None):
        total = sum(counts.values())
        row = [(token, math.log1p(counts[token] / total * 1e4)) for token in sorted(counts)]
        asked = total if target_depth is None else target_depth
        return [*row, (target, math.log10(asked) if asked else 0.0), (source, math.log10(total) if total else 0.0)]


@pytest.fixture(scope="session")
def oracle():
    return Oracle


@pytest.fixture(scope="session")
def human_ensembl(scfm_data):
    """Geneformer V2's vocabulary with the symbols that it knows, and its medians."""
    from scfm.encoding import read_medians, read_vocabulary

    folder = scfm_data / "vocab"
    vocabulary = read_vocabulary(
        folder / "geneformer_token_dictionary_gc95M.pkl", aliases=folder / "geneformer_gene_name_id_dict_gc95M.pkl"
    )
    return vocabulary, read_medians(folder / "geneformer_gene_median_dictionary_gc95M.pkl", vocabulary)


@pytest.fixture(scope="session")
def human_symbols(scfm_data):
    """scGPT's whole-human vocabulary."""
    from scfm.encoding import read_vocabulary

    return read_vocabulary(scfm_data / "vocab" / "scgpt_human_finetuned_model_vocab.json")


@pytest.fixture(params=["numpy", "compiled"])
def backend(request):
    """Both backends; the compiled one where it was built."""
    from scfm.data.compiled_encoder import encoder_module

    if request.param == "compiled" and encoder_module() is None:
        pytest.skip("scfm._host was not built, or SCFM_DISABLE_EXT turns it off")
    return request.param


@pytest.fixture
def small_vocabulary():
    return Vocabulary.from_genes([f"G{place}" for place in range(12)])


def pairs(cells, cell):
    """One cell of a CellBatch as a list of (token, value), or of tokens where there are no values."""
    start, stop = cells.cu_seqlens[cell : cell + 2].tolist()
    tokens = cells.gene_ids_T[start:stop].tolist()
    return tokens if cells.values_T is None else list(zip(tokens, cells.values_T[start:stop].tolist()))


@pytest.fixture(scope="session")
def tokens_of():
    return pairs
