"""`scfm tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scfm
from scfm._files import require_folder
from scfm.cli import _files
from scfm.cli._registry import command

BATCH_CELLS = 1024


@command(
    example="scfm tokenize donor1.h5ad donor2.h5ad tokens --model pbmc_model",
    options_of="scfm.pp.encode",
    leave_out={"empty", "rng", "backend"},
)
def tokenize(*paths: Path, model: Path, overwrite: bool = False, json: bool = False, **options: Any) -> None:
    """Encode the cells of one or many files once, for many epochs over the same tokens.

    Parameters
    ----------
    paths
        One or many .h5ad or .zarr inputs with raw counts, and last the folder to write: a token store, cells in the
        order of the files.
    model
        Directory of the model whose encoding is used.
    overwrite
        Replace a token store of this name.
    json
        Print the result as one JSON object instead of words.
    """
    from tqdm.auto import tqdm

    from scfm.data import TokenStore
    from scfm.train.stream import CellStream

    *sources, target = _files.inputs_and_output(paths)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another name, or pass --overwrite to replace a token store.")
    require_folder(target.parent)
    encoding = scfm.load(model, device="cpu").encoding
    stream = CellStream(sources, encoding, batch_cells=BATCH_CELLS, shuffle=False, **options)
    TokenStore.write(target, tqdm(stream, desc="encoding", unit="batch"), encoding, overwrite=overwrite)
    store = TokenStore(target)
    facts = {"output": target, "n_cells": len(store), "n_tokens": store.info["n_tokens"]}
    _files.tell(facts, as_json=json, text=f"{len(store):,} cells, {facts['n_tokens']:,} tokens written to {target}")
