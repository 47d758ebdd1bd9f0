"""Errors that a user can meet, one class for each kind of cure."""


class ScfmError(Exception):
    """Base of every error that scfm raises on purpose."""


class CountsError(ScfmError, ValueError):
    """The matrix does not hold raw counts: negative, not finite, or already normalised."""


class VocabularyMismatchError(ScfmError, ValueError):
    """The genes of the data and those of the model do not fit together."""


class EmptyCellError(ScfmError, ValueError):
    """A cell has no expressed gene that the vocabulary knows."""


class LabelsError(ScfmError, ValueError):
    """The labels cannot be used: missing column, one class, or too few cells."""


class ModelFileError(ScfmError, ValueError):
    """A saved model or checkpoint is damaged, incomplete, of another kind, or unsafe."""


class ModelTaskError(ScfmError, ValueError):
    """The model was not trained for what it is asked to do."""
