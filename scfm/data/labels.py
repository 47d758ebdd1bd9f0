"""Labels of cells as codes."""

from scfm.data.columns import Labels

__all__ = ["Labels"]
