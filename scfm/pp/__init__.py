"""Preparation of data, the scanpy way: `import scfm; scfm.pp.encode(adata, model)`."""

from scfm.pp._check import DataCheck, check
from scfm.pp._encode import encode
from scfm.pp._expression import log_expression

__all__ = ["DataCheck", "check", "encode", "log_expression"]
