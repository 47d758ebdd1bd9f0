"""Errors that a user can meet, one class for each kind of remedy."""


class ScfmError(Exception):
    """Base of every error that scfm raises on purpose."""


class CountsError(ScfmError, ValueError):
    """The matrix does not hold raw counts: negative, not finite, or already normalized."""


class VocabularyMismatchError(ScfmError, ValueError):
    """The genes of the data and those of the model do not match."""


class EmptyCellError(ScfmError, ValueError):
    """A cell expresses no gene of the vocabulary."""


class LabelsError(ScfmError, ValueError):
    """The labels cannot be used: missing column, one class, or too few cells."""


class ModelFileError(ScfmError, ValueError):
    """A saved model or checkpoint is damaged, incomplete, of another kind, or unsafe."""


class ModelTaskError(ScfmError, ValueError):
    """The model was not trained for this task."""


class OutputError(ScfmError, OSError):
    """An output cannot be written: its disk is full, or another process is writing it."""
