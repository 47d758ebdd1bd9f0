"""Descriptions of parameters that many functions share, written once and inserted into their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])

# Each entry is one complete numpydoc entry, or several that always occur together.
SHARED = {
    "adata": """
adata
    Raw counts, n_obs cells by n_vars genes, in `X` or in `layer`.
""",
    "model": """
model
    A model from `scfm.fit` or `scfm.load`, or the path of one.
""",
    "layer": """
layer
    Layer that holds the counts, or "raw" for `adata.raw`. None for `adata.X`.
""",
    "gene_key": """
gene_key
    Column of `adata.var` with gene names or ids of the kind that the vocabulary uses. None for `var_names`, or for
    `feature_name` and similar columns of CELLxGENE if `var_names` are of another kind.
""",
    "depth_key": """
depth_key
    Column of `adata.obs` with each cell's total counts over all measured genes, for data that hold only some of the
    genes. None for the column named in `adata.uns["scfm"]["depth_key"]`, or, without one, for the sum of each row.
""",
    "hidden_layer": """
hidden_layer
    Hidden state to pool, counted as Python counts: -1 is the last. None for the default of the model's family
    (-2 for Geneformer).
""",
    "pooling": """
pooling
    "mean" or "max" over the gene tokens, "cls", or "concat" (scFoundation: source depth, target depth, maximum and
    mean). None for the default of the model's family.
""",
    "normalize": """
normalize
    Whether to divide each embedding by its length. None for the default of the model's family (scGPT does).
""",
    "precision": """
precision
    "fp32", or "bf16" for several times the speed, with a cosine similarity above 0.999 to the embeddings in fp32.
""",
    "obsm_key_added": """
key_added
    Key of `adata.obsm` for the embedding.
""",
    "uns_key_added": """
key_added
    Key of `adata.uns` for the table. None to return it only.
""",
    "prefix_key_added": """
key_added
    Prefix of the names of all results.
""",
    "checkpoint": """
vocabulary
    Vocabulary of a published checkpoint, if its folder has none: a path (published pickle, JSON or TSV), a mapping of token
    to id, or a `Vocabulary`.
medians
    Medians of the genes, which a Geneformer checkpoint needs: a path, a mapping of gene to median, or an array by token id.
strict
    Whether to refuse a checkpoint with missing, unknown or misshapen tensors. False loads the tensors that fit, and warns
    with the list of the others.
""",
    "copy": """
copy
    Return a copy with the result instead of writing to `adata`.
""",
    "progress": """
progress
    Whether to show a progress bar.
""",
    "seed": """
seed
    Seed of everything random. The same seed gives the same result on one machine.
""",
    "batch_key": """
batch_key
    Column of `adata.obs` with donors or experimental batches.
""",
    "start_and_goal": """
groupby
    Column of `adata.obs` with the states of the cells.
start
    State whose cells are perturbed. None for all cells except those of `goal`.
goal
    State whose mean embedding the perturbed cells should approach.
""",
    "positions": """
positions
    What a rank encoding does after a deletion: with "shift", later genes move up by one rank, as published; with
    "held", they keep their positions.
""",
    "n_bootstrap": """
n_bootstrap
    Number of resamples of the cells for the confidence intervals. 0 for no intervals.
""",
    "figure": """
ax
    Axes to draw on. None for a new figure.
show
    Whether to show the figure. None to show it unless `save` is given.
save
    File to write the figure to; its suffix names the format.
""",
}

_PLACEHOLDER = re.compile(r"^(?P<indent> *)\{(?P<name>\w+)\}$", re.MULTILINE)


def document(function: F) -> F:
    """Replace each docstring line that holds only a name in braces by the shared description of that name.

    Parameters
    ----------
    function
        A function whose docstring has lines such as ``{layer}``; every name must be a key of `SHARED`.

    Returns
    -------
    The same function with its complete docstring.

    Examples
    --------
    >>> from scfm._docs import document
    >>> @document
    ... def embed(progress=True):
    ...     '''Embed cells.
    ...
    ...     Parameters
    ...     ----------
    ...     {progress}
    ...     '''
    >>> "Whether to show a progress bar." in embed.__doc__
    True
    """
    if function.__doc__ is not None:  # it is None under `python -OO`
        function.__doc__ = _PLACEHOLDER.sub(_description, inspect.cleandoc(function.__doc__))
    return function


def _description(placeholder: re.Match[str]) -> str:
    indent = placeholder["indent"]
    return "\n".join(indent + line for line in SHARED[placeholder["name"]].strip().splitlines())
