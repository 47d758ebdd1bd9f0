"""Check files from other sources before they are parsed: incomplete downloads, and pickles that would exhaust memory.

A pickle can ask for any function; the readers allow only known names. In addition, a few bytes can make Python's parser
allocate gigabytes (a large memo index or length) or overflow the C stack (a deeply nested tuple as a key). The functions
here therefore check the opcodes of a pickle first, without building any object, in memory proportional to the file.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from scfm.errors import ModelFileError

MAX_OPCODES = 2_000_000
MAX_DEPTH = 100
MAX_PICKLE_BYTES = 256 * 1024**2
_LFS_START = b"version https://git-lfs.github.com/spec/"
# A file of torch before version 1.6 holds this many pickles: magic number, protocol, system, content, storages.
_LEGACY_PICKLES = 5

# Opcodes that add items to a container.
_GROWING = {"SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS", "BUILD"}
_PLAIN = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP",
    "EMPTY_DICT", "DICT", "EMPTY_LIST", "LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "SETITEM", "SETITEMS", "APPEND", "APPENDS",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
_OF_TORCH = _PLAIN | {"BINPERSID", "NEWOBJ", "EMPTY_SET", "ADDITEMS"}


def require_downloaded(path: Path) -> None:
    """Raise `ModelFileError` if a file is empty, or is a git-lfs pointer to a file that was not downloaded."""
    with path.open("rb") as file:
        start = file.read(len(_LFS_START))
    if not start:
        raise ModelFileError(f"{path} is empty: its download was not completed. Download it again.")
    if start == _LFS_START:
        raise ModelFileError(
            f"{path} is a git-lfs pointer, not the file itself. Fetch the file with `git lfs pull` in its folder, or "
            "download it again."
        )


def check_pickle(content: bytes, source: str) -> None:
    """Check a pickle of plain containers, strings and numbers.

    Raises
    ------
    ModelFileError
        If it is damaged, holds other opcodes, is nested deeper than `MAX_DEPTH`, or would allocate too much memory.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise ModelFileError(
            f"{source} has {len(content):,} bytes; dictionaries of genes have at most {MAX_PICKLE_BYTES:,}."
        )
    _walk(io.BytesIO(content), _PLAIN, source)


def check_torch_file(path: Path) -> None:
    """Check a `torch.save` file before torch reads it: the sizes of its members, then the pickle of its content.

    Raises
    ------
    ModelFileError
        If members are larger than the file, or the pickle is damaged or would exhaust the process.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise ModelFileError(
                    f"{path} is cut short: the table of contents at its end is missing. Copy or download it again."
                )
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _walk(file, _OF_TORCH, str(path))
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ModelFileError(
                f"{path} has members that are larger than the file. It is damaged, or made to exhaust memory."
            )
        for member in members:
            if member.filename.endswith(".pkl"):
                if member.file_size > MAX_PICKLE_BYTES:
                    raise ModelFileError(
                        f"{path} describes its content in {member.file_size:,} bytes, which is too much to be read."
                    )
                _walk(io.BytesIO(archive.read(member)), _OF_TORCH, str(path))


def _walk(file: IO[bytes], allowed: Collection[str], source: str) -> None:
    """Simulate the stack of one pickle with the nesting depth of each object."""
    stack: list[int] = []  # -1 is a mark
    memo: dict[Any, int] = {}
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            name = opcode.name
            if name not in allowed:
                raise ModelFileError(f"it uses {name}, which plain data does not need")
            if number >= MAX_OPCODES:
                raise ModelFileError(f"it has more than {MAX_OPCODES:,} steps")
            if name in _PUTS:
                index = len(memo) if argument is None else argument
                if index > number + 16:
                    raise ModelFileError(f"it would fill memory (index {index:,} of its memo)")
                memo[index] = stack[-1]
            elif name in _GETS:
                stack.append(memo[argument])
            else:
                _apply(name, stack)
                if stack and stack[-1] > MAX_DEPTH:
                    raise ModelFileError(f"it is nested deeper than {MAX_DEPTH} levels")
    except ModelFileError as error:
        raise ModelFileError(f"The pickle in {source} is not read: {error}.") from None
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise ModelFileError(
            f"{source} is not a readable pickle ({type(error).__name__}: {error}). "
            "It is damaged or incomplete, or it is not a checkpoint."
        ) from error


def _apply(name: str, stack: list[int]) -> None:
    """Apply an opcode to the stack: new objects are nested one level deeper than the deepest object that it takes."""
    takes_to_mark, n_fixed, n_after = _EFFECT[name]
    taken: list[int] = []
    if takes_to_mark:
        while (depth := stack.pop()) >= 0:
            taken.append(depth)
    taken += [stack.pop() for _ in range(n_fixed)]
    if name in _GROWING:
        stack.append(max([taken[-1], *(1 + depth for depth in taken[:-1])]))
    elif name == "MARK":
        stack.append(-1)
    elif name == "DUP":
        stack += taken * 2
    elif n_after:
        stack += [1 + max(taken, default=0)] * n_after


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """Return whether an opcode takes all objects down to the last mark, how many others it takes, and how many it adds."""
    marked = pickletools.stackslice in opcode.stack_before
    return marked, len(opcode.stack_before) - 2 * marked, len(opcode.stack_after)


_EFFECT = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
