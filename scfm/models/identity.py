"""`Model.id`: a hash of everything that affects predictions, computed again only if something has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scfm.models.state import ModelState

_CHUNK = 1024  # bytes that are summed to one number by `contents`

# By model: what its id was computed from, and the id. It is not an attribute, so that copies and files do not carry it.
_computed: WeakKeyDictionary[ModelState, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def model_id(state: ModelState) -> str:
    """Return twelve hexadecimal digits of a SHA-256 over settings and tensors; see `ModelState.id`."""
    encoding = state.encoding
    tensors = {name: torch.from_numpy(array.copy()) for name, array in encoding.arrays().items()}
    tensors = dict(sorted(tensors.items())) | dict(sorted(state.network.state_dict().items()))
    settings = (state.network.config, encoding.config, encoding.vocabulary, tuple(state.labels), state.calibration)
    key = (*settings, contents(tensors))
    known = _computed.get(state)
    if known is None or known[0] != key:
        known = _computed[state] = key, _hashed(state, tensors)
    return known[1]


def contents(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest that changes when a tensor changes, ten times faster than a SHA-256 of all bytes.

    It depends on names, types, shapes, and the sum of every kilobyte as integers, so it also sees changes that torch does not
    count, such as those of `parameter.data` or of a NumPy array with the same memory. It is no proof against forgery.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        bytes_N = _bytes(tensor)
        whole = len(bytes_N) // _CHUNK * _CHUNK
        if whole:
            digest.update(bytes_N[:whole].view(torch.int64).view(-1, _CHUNK // 8).sum(1).cpu().numpy().data)
        digest.update(bytes_N[whole:].cpu().numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, at an address that a view as int64 can start at."""
    bytes_N = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return bytes_N if bytes_N.storage_offset() % 8 == 0 else bytes_N.clone()


def _hashed(state: ModelState, tensors: Mapping[str, Tensor]) -> str:
    settings = {
        "network": state.network.config.to_dict(),
        "encoding": state.encoding.to_dict(),
        "vocabulary": state.encoding.vocabulary.to_dict(),
        "labels": state.labels,
        "calibration": None if state.calibration is None else state.calibration.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor).cpu().numpy().data)
    return digest.hexdigest()[:12]
