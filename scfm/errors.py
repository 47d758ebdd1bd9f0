"""Exceptions of scfm."""


class ScfmError(Exception):
    """Base class of the exceptions that scfm defines."""


class CountsError(ScfmError, ValueError):
    """The matrix does not hold raw counts: values are negative, not finite, or already normalized."""


class VocabularyMismatchError(ScfmError, ValueError):
    """The genes of the data and those of the model do not match."""


class EmptyCellError(ScfmError, ValueError):
    """A cell expresses no gene of the vocabulary."""


class LabelsError(ScfmError, ValueError):
    """The labels cannot be used: the column is missing, or has too few classes or cells."""


class ModelFileError(ScfmError, ValueError):
    """A saved model or checkpoint is damaged, incomplete, unsafe, or has another format."""


class ModelTaskError(ScfmError, ValueError):
    """The model was not trained for this task."""


class OutputError(ScfmError, OSError):
    """An output cannot be written: its disk is full, or another process is writing it."""
