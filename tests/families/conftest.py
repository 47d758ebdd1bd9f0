"""Small published models with random weights: no download, but the real classes and file layouts."""

import json

import numpy as np
import pytest
import torch

from scfm.data import CellBatch

LENGTHS = (5, 31, 1, 17)


def gene_ids(n):
    return [f"ENSG{place:011d}" for place in range(n)]


def tokens_of(n_genes, *, v2):
    specials = ["<pad>", "<mask>", "<cls>", "<eos>"] if v2 else ["<pad>", "<mask>"]
    return {token: place for place, token in enumerate([*specials, *gene_ids(n_genes)])}


def bert_config(n_tokens, **changes):
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": n_tokens,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_act": "relu",
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.02,
        "attention_probs_dropout_prob": 0.02,
    }
    return transformers.BertConfig(**settings | changes)


def shaken(module, seed=0, scale=0.1):
    """Give every parameter a random value, so that no bias, gain or zero row hides an exchange."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def write_dictionaries(folder, tokens):
    (folder / "token_dictionary.json").write_text(json.dumps(tokens))
    medians = {gene: 1.0 + place / 7 for gene, place in tokens.items() if gene.startswith("ENSG")}
    (folder / "median_dictionary.json").write_text(json.dumps(medians))


@pytest.fixture
def ragged():
    """Build a batch of four cells of different lengths from a vocabulary size."""

    def build(n_tokens, *, values=None, seed=0):
        rng = np.random.default_rng(seed)
        ids = np.concatenate([rng.permutation(np.arange(4, n_tokens))[:length] for length in LENGTHS])
        return CellBatch(
            gene_ids_T=torch.from_numpy(ids.astype(np.int32)),
            cu_seqlens=torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32),
            values_T=None if values is None else torch.from_numpy(rng.choice(values, len(ids)).astype(np.float32)),
            cell_index_B=torch.arange(len(LENGTHS)),
        )

    return build


def padded(packed_T, cells, fill=0):
    """(B, L) or (B, L, ...) from packed tokens."""
    parts = packed_T.split(cells.lengths_B.tolist())
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def packed(padded_BL, cells):
    return torch.cat([row[:length] for row, length in zip(padded_BL, cells.lengths_B.tolist())])
