"""Preparation of data, the scanpy way: `import scfm; scfm.pp.encode(adata, model)`."""

from scfm.pp._check import DataCheck, check
from scfm.pp._encode import encode

__all__ = ["DataCheck", "check", "encode"]
