"""The command line: `scfm doctor`, `scfm fit`, ... each a thin call of the public function of the same name."""

from scfm.cli._app import main

__all__ = ["main"]
