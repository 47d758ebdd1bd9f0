"""`scfm.load`: open a saved model, whoever saved it; `convert`: from one format to another."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from scfm.errors import ModelFileError
from scfm.models.interop import geneformer, scbert, scfoundation, scgpt
from scfm.models.io.dictionaries import Source
from scfm.models.io.load import is_saved, load_saved
from scfm.models.model import Model

FAMILIES: dict[str, ModuleType] = {family.NAME: family for family in (geneformer, scgpt, scbert, scfoundation)}
FAMILY_OF_ENCODING = {"rank": "geneformer", "bin": "scgpt", "bucket": "scbert", "continuous": "scfoundation"}


def load(
    path: str | Path, *, vocabulary: Source | None = None, medians: Source | None = None, strict: bool = True
) -> Model:
    """Open a model that `model.save` wrote, or a published checkpoint.

    Read are our own directory, a Geneformer directory (V1 or V2; pretrained, cell or gene classifier), an scGPT directory, an
    scBERT file and an scFoundation file. Nothing in the files is executed: weights are safetensors, or are read
    with torch's weights-only loader; pickled dictionaries pass an allow-list. Every tensor is accounted for: it is loaded, or
    listed with the reason in ``model.checkpoint.unused``.

    Parameters
    ----------
    path
        Directory or file.
    vocabulary
        Published checkpoints without a vocabulary beside them need one: a path (published pickle, our JSON, a TSV), a
        mapping of token to id, or a `Vocabulary`.
    medians
        Geneformer needs its genes' medians: a path, a mapping of gene to median, or an array by token id.
    strict
        False loads what fits, and warns with the list of what does not.

    Raises
    ------
    ModelFileError
        If files are missing, damaged, unsafe, of a later format or of no known kind, or if a tensor is missing, unknown or
        misshapen; the message lists them.

    Examples
    --------
    >>> import scfm
    >>> model = scfm.load("demo_output/model")  # doctest: +SKIP
    >>> model = scfm.load("Geneformer-V1-10M", vocabulary="tokens.pkl", medians="medians.pkl")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(
            f"There is no {path}. Give a directory that `model.save` wrote, or a published checkpoint."
        )
    if path.suffix in (".h5ad", ".zarr"):
        raise ModelFileError(f"{path} holds cells, not a model. Give a directory that `model.save` wrote.")
    if is_saved(path):
        if vocabulary is not None or medians is not None:
            raise ModelFileError(
                f"{path} is a saved scfm model and holds its own dictionaries; leave `vocabulary` and `medians` out."
            )
        return Model(**vars(load_saved(path)))
    family = _family_of(path)
    arguments: dict[str, Any] = {"vocabulary": vocabulary, "strict": strict}
    if family is geneformer:
        arguments["medians"] = medians
    elif medians is not None:
        raise ModelFileError(f"{path} is a checkpoint of {family.NAME}, which has no medians; leave `medians` out.")
    return family.read(path, **arguments)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    vocabulary: Source | None = None,
    medians: Source | None = None,
    strict: bool = True,
) -> Model:
    """Read a model in one format and write it in another.

    Parameters
    ----------
    source
        Anything that `load` opens.
    target
        Directory or file to write; must not exist, unless it is a saved scfm model.
    to
        "scfm", or the family whose published format to write ("geneformer", "scgpt", "scbert", "scfoundation"). None: a
        published checkpoint becomes ours, one of ours becomes that of the family with its encoding.
    vocabulary, medians, strict
        As in `load`.

    Returns
    -------
    The model that was read.

    Raises
    ------
    ModelFileError
        If `source` cannot be read, `target` exists, or the model has settings that the target's code does not know.

    Examples
    --------
    >>> import scfm
    >>> model = scfm.fit(scfm.datasets.pbmc(), config=scfm.FitConfig(n_steps=2), progress=False)
    >>> model.save("ours")
    >>> scfm.models.convert("ours", "theirs", to="geneformer").id == model.id
    True
    >>> scfm.load("theirs", vocabulary=model.encoding.vocabulary, medians=model.encoding.medians).network.config.n_layers
    3
    """
    source, target = Path(source), Path(target)
    model = load(source, vocabulary=vocabulary, medians=medians, strict=strict)
    if to is None:
        to = FAMILY_OF_ENCODING[model.encoding.config.kind] if is_saved(source) else "scfm"
    if to == "scfm":
        model.save(target)
        return model
    if to not in FAMILIES:
        raise ValueError(f"`to` is {to!r}; choose 'scfm' or one of {', '.join(FAMILIES)}.")
    if FAMILY_OF_ENCODING[model.encoding.config.kind] != to:
        raise ModelFileError(
            f"{source} has a {model.encoding.config.kind} encoding, which {to} does not read. "
            f"Write it as {FAMILY_OF_ENCODING[model.encoding.config.kind]!r} or 'scfm'."
        )
    if target.exists():
        raise ModelFileError(f"{target} exists and is not overwritten. Choose another path, or remove it.")
    FAMILIES[to].write(model, target)
    return model


def _family_of(path: Path) -> ModuleType:
    for family in FAMILIES.values():
        if family.recognises(path):
            return family
    raise ModelFileError(
        f"{path} is of no known kind. Understood are a directory that `model.save` wrote, a Geneformer directory (config.json "
        "of a BERT), an scGPT directory (args.json), an scBERT file (a dict with 'model_state_dict'), and an scFoundation file."
    )
