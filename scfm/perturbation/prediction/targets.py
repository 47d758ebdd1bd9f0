"""Names of perturbations: the genes that they stand for, and checks of these genes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from scfm.errors import VocabularyMismatchError
from scfm.perturbation.variants import similar_gene

Target = tuple[str, ...]


def read_target(name: str, *, control: str, separator: str) -> Target:
    """Return the genes of a name such as "A", "A+B" or "A+ctrl" (GEARS), each once, sorted; none for the control.

    Examples
    --------
    >>> from scfm.perturbation.prediction.targets import read_target
    >>> [read_target(name, control="ctrl", separator="+") for name in ("B+A", "A + B", "ctrl+A", "ctrl")]
    [('A', 'B'), ('A', 'B'), ('A',), ()]
    """
    parts = {part.strip() for part in name.split(separator)} if name != control else set()
    return tuple(sorted(parts - {control, ""}))


def read_targets(names: Sequence[str], known: Collection[str], *, control: str, separator: str) -> list[Target]:
    """Return the genes of each entry of `predict`.

    Raises
    ------
    ValueError
        If `names` is a string, is empty, or has an entry without a gene.
    VocabularyMismatchError
        If a gene is not among `known`.
    """
    if isinstance(names, str):
        raise ValueError(f"`predict` is the string {names!r}; pass a list of names, such as [{names!r}].")
    targets = [read_target(name, control=control, separator=separator) for name in names]
    if not targets:
        raise ValueError("`predict` is empty; name at least one perturbation.")
    if bare := [name for name, target in zip(names, targets) if not target]:
        raise ValueError(f"`predict` has the entry {bare[0]!r}, which has no gene except the control {control!r}.")
    unknown = dict.fromkeys(gene for target in targets for gene in target if gene not in known)
    if unknown:
        shown = "; ".join(f"{gene!r}.{similar_gene(gene, sorted(known))}" for gene in list(unknown)[:5])
        raise VocabularyMismatchError(
            f"{len(unknown)} genes of `predict` are neither in the data, nor in the model's vocabulary, nor measured: "
            f"{shown}"
        )
    return targets
