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
    AnnData with raw counts of n_obs cells by n_vars genes, in `adata.X` or in `layer`.
""",
    "adata_or_files": """
adata
    Raw counts of n_obs cells by n_vars genes: an AnnData (in memory, backed or lazy), an AnnCollection, or one or several
    paths of `.h5ad` files and `.zarr` folders, URLs (also `soma://`), patterns such as `donors/*.h5ad`, or `.txt` files with one
    of these per line. Files are read in blocks. The genes of several files are all genes of all of them, matched by name; a cell has no
    counts of genes that its file lacks.
""",
    "paths": """
paths
    Files with raw counts: one or several paths of `.h5ad` files or `.zarr` folders, URLs of such files (https, s3, gs and
    others of fsspec), `soma://` URLs of TileDB-SOMA experiments (see :class:`scfm.data.SomaPath`), patterns such as
    `donors/*.h5ad`, or `.txt` files with one of these per line.
""",
    "model": """
model
    A model, or the path or the repository name of one (see `scfm.load`).
""",
    "layer": """
layer
    Key of `adata.layers` with the counts, or "raw" for `adata.raw`. None for `adata.X`.
""",
    "gene_key": """
gene_key
    Column of `adata.var` with the names of the genes: symbols (CD74) or Ensembl ids (ENSG00000019582), as in the
    vocabulary. None: `var_names`, or, if these are of the other kind, a common column with the right kind, such as
    `feature_name`.
""",
    "depth_key": """
depth_key
    Column of `adata.obs` with each cell's total counts over all measured genes. Needed if the matrix holds only some of
    these genes. None: the column that `adata.uns["scfm"]["depth_key"]` names, or, without one, the sum of each row.
""",
    "hidden_layer": """
hidden_layer
    Index of the layer whose output is pooled: 0 is the input of the first block, -1 the output of the last block. None
    for the setting of the model (-2 for published Geneformer models, -1 for others).
""",
    "pooling": """
pooling
    How the token vectors of a cell are combined. "mean" or "max": over the genes. "weighted": mean over the genes, weighted
    by the values, or by 1 / (1 + rank / 50) in rank encodings. "cls": the vector of the cls token. "concat": the vectors of
    the two read-depth tokens, the maximum and the mean, concatenated (scFoundation). None for the setting of the model.
""",
    "normalize": """
normalize
    Whether to divide each embedding by its Euclidean norm. None for the setting of the model (True for published scGPT
    models).
""",
    "precision": """
precision
    "fp32" or "bf16". On processors with bfloat16 instructions "bf16" is faster; in the tests, embeddings have a cosine
    similarity above 0.999 to those in fp32.
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
    Prefix of the names of all results: KEY in `KEY_label`.
""",
    "checkpoint": """
vocabulary
    Vocabulary of a published checkpoint whose folder has none: a path (see `scfm.encoding.read_vocabulary`), a mapping of
    token to id, or a `Vocabulary`.
medians
    Median expression of each gene, which a Geneformer checkpoint needs: a path, a mapping of gene to median, or an array by
    token id.
strict
    Whether tensors that are missing, unknown or of the wrong shape are an error. With False, the tensors that match are
    loaded, and a warning lists the others.
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
    Column of `adata.obs` with groups of cells, such as cell types or conditions.
start
    Group of cells to perturb. None for all cells except those of `goal`.
goal
    Group of cells to whose mean embedding the perturbed cells are compared.
""",
    "positions": """
positions
    For rank encodings, the positions of the genes after a deleted one: "shift" moves them up by one, as in Geneformer,
    "held" leaves them unchanged. This is unrelated to the measure "shift".
""",
    "how_labels_are_made": """
min_confidence
    Cells whose predicted label has a lower probability become "unassigned".
max_novelty
    Cells with a larger novelty score become "unassigned". "calibrated" for `model.calibration.novelty_threshold`, which
    95 % of the calibration cells do not exceed (see `adapt` for another). None to reject no cell; the log then says how many cells "calibrated"
    would reject.
majority_key
    Column of `obs` with clusters. Every cell gets the label that is predicted most often in its cluster; its confidence is
    its own probability of this label. Then cells are rejected. Cells without a cluster (NaN) keep their own label.
adapt
    Whether to predict again with the help of the other cells, for cells of another study or condition than the model's;
    without labels, and in seconds. What the predicted classes have in common in their difference from the training cells is
    ignored, and then a regression on 50 principal components of these cells is fitted to the probabilities. The novelty
    becomes that of groups of similar cells: the mean over each cell and its nearest cells, above what is typical of these
    cells. This finds unknown types much better if most classes and most cells are known; otherwise it can hide them, so omit
    `adapt` for cells of another tissue. "calibrated" is then `model.calibration.group_novelty_threshold`, which is smaller;
    models without one keep the novelty of single cells. Label and novelty of a cell then depend on the other cells. Needs at
    least 100 cells, and holds the expression of all of them in memory.
""",
    "n_bootstrap": """
n_bootstrap
    Number of bootstrap samples of the cells for the confidence intervals. 0 for no intervals.
""",
    "figure": """
ax
    Axes to draw on. None for a new figure.
show
    Whether to show the figure. None to show it unless `save` is given.
save
    File to write the figure to, whose suffix determines the format. None to write no file.
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
