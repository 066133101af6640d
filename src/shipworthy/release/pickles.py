# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUntypedBaseClass=false, reportUnknownArgumentType=false
"""What a pickle would import, found by running it with nothing to run.

A scanner that only lists opcodes loses its place in a joblib file, where raw arrays stand between
the opcodes, and sees nothing of a compressed one. Here the standard library's own pickle machine,
the one written in Python, reads the stream; but every import gives an inert stand-in, so that each
call does nothing. What can't be followed to its end is an error, never a clean result.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import pickle
import pickletools
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import IO, Any, ClassVar, Self, cast

Import = tuple[str, str]
"""Module and name, as the pickle spells them."""

HEAD = 64 * 1024
"""Bytes from a file's beginning that tell what it is."""

_MAGIC = {bytes([0x80, protocol]) for protocol in range(6)}
_GLOBALS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
_DESCRIPTION = re.compile(r"[<>|=]?([a-zA-Z])(\d*)")
_BUDGET = 256 * 1024 * 1024
"""Bytes outside arrays that a compressed stream may unfold into, beyond twenty times its size."""
_MOST_PADDING = 64


class Unreadable(Exception):
    """The stream can't be followed to its end."""


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a pickle of any protocol.

    The first two protocols have no mark of their own, so those are recognised by parsing: an import
    must come before the end, or before `head` does.
    """
    marked = head[:2] in _MAGIC
    seen, imports = 0, False
    try:
        for opcode, _, _ in pickletools.genops(BytesIO(head)):
            seen += 1
            imports = imports or opcode.name in _GLOBALS
            if marked and seen > 1:
                return True
    except Exception as error:  # noqa: BLE001  # pickletools raises whatever it stumbles over
        cut = "unknown" not in str(error) and len(head) >= HEAD
        return imports and cut
    return imports


def decompressed(stream: IO[bytes], head: bytes) -> IO[bytes] | None:
    """The stream behind one of joblib's compressions; None when it is not compressed.

    Raises Unreadable for a compression that can't be undone here.
    """
    openers: dict[bytes, Callable[[IO[bytes]], Any]] = {
        b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
        b"BZh": bz2.BZ2File,
        b"\xfd7zXZ": lzma.LZMAFile,
        b"\x5d\x00\x00": partial(lzma.LZMAFile, format=lzma.FORMAT_ALONE),
        b"\x78\x01": _zlib, b"\x78\x5e": _zlib, b"\x78\x9c": _zlib, b"\x78\xda": _zlib,
    }  # fmt: skip
    for prefix, opener in openers.items():
        if head.startswith(prefix):
            return cast("IO[bytes]", opener(stream))
    if head.startswith((b"\x04\x22\x4d\x18", b"ZF0x")):
        message = "it is compressed in a way that can't be looked into"
        raise Unreadable(message)
    return None


def _zlib(raw: IO[bytes]) -> Any:
    from joblib.compressor import BinaryZlibFile

    return BinaryZlibFile(raw)


def imports_of(stream: IO[bytes], size: int, *, compressed: bool = False) -> set[Import]:
    """Everything that loading the pickle at the stream's position would import.

    Args:
        stream: Where the pickle begins.
        size: Bytes of the file that holds it, from which what may be read is bounded.
        compressed: Whether the stream unfolds a compressed file.

    Raises:
        Unreadable: It is cut short, damaged, too large when unfolded, or tries to mislead.

    """
    bounded = _Bounded(stream, _BUDGET + 20 * size if compressed else size)
    imports: set[Import] = set()
    _load(bounded, imports)
    try:  # some formats put several pickles in a row; what follows may also be plain data
        while True:
            _load(bounded, imports)
    except Unreadable:
        return imports


def _load(source: _Bounded, imports: set[Import]) -> None:
    try:
        _Inert(source, imports).load()
    except Unreadable:
        raise
    except Exception as error:
        message = f"it can't be followed to its end ({type(error).__name__}: {error})"
        raise Unreadable(message[:200]) from error


class _Bounded:
    """Reads no more than a budget, so that a length field can't ask for all memory."""

    def __init__(self, stream: IO[bytes], budget: int) -> None:
        self._stream = stream
        self._left = budget

    def read(self, count: int) -> bytes:
        self._spend(count)
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(min(self._left, sys.maxsize - 1) + 1)
        self._spend(len(line))
        return line

    def skip(self, count: int) -> None:
        """Pass over an array's bytes, which cost time but no memory."""
        while count > 0:
            passed = len(self._stream.read(min(count, 1024 * 1024)))
            if not passed:
                message = "it ends inside an array"
                raise Unreadable(message)
            count -= passed

    def _spend(self, count: int) -> None:
        if count < 0 or count > self._left:
            message = "it announces more bytes than it can hold"
            raise Unreadable(message)
        self._left -= count


class _Anything:
    """Stands for whatever was imported, and for all that calling it would give. It does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __call__(self, *_: object, **__: object) -> _Anything:
        return _Anything()

    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...
    def add(self, item: object) -> None: ...


class _Dtype(_Anything):
    """A `numpy.dtype`: its size, and whether arrays of it hold pickled objects."""

    itemsize = 0
    hasobject = False

    def __init__(self, *arguments: Any, **_: Any) -> None:
        match = _DESCRIPTION.fullmatch(str(arguments[0])) if arguments else None
        if not match:
            message = "it holds an array of a type that is not known"
            raise Unreadable(message)
        wide = 4 if match[1] == "U" else 1
        self.itemsize = wide * int(match[2] or 1)
        self.hasobject = match[1] == "O"

    def __setstate__(self, state: object) -> None:
        """A record's or sub-array's parts say whether it holds objects."""
        parts = [state]
        while parts:
            part = parts.pop()
            if isinstance(part, _Dtype):
                self.hasobject = self.hasobject or part.hasobject
            elif isinstance(part, tuple):
                parts.extend(part)
            elif isinstance(part, dict):
                parts.extend(part.values())


class _JoblibArray(_Anything):
    """A `joblib` wrapper, after which an array's bytes stand in the stream."""

    state: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        self.state = dict(state) if isinstance(state, dict) else {}

    def pass_over(self, source: _Bounded, imports: set[Import]) -> None:
        dtype, shape = self.state.get("dtype"), self.state.get("shape")
        if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
            message = "it holds an array that does not say its type and shape"
            raise Unreadable(message)
        if dtype.hasobject:
            _load(source, imports)
            return
        if self.state.get("numpy_array_alignment_bytes") is not None:
            padding = source.read(1)
            source.skip(padding[0] if padding else _MOST_PADDING)
        source.skip(math.prod(int(length) for length in shape) * dtype.itemsize)


_STAND_INS: dict[Import, type[_Anything]] = {
    ("numpy", "dtype"): _Dtype,
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _JoblibArray,
}


class _Inert(pickle._Unpickler):  # noqa: SLF001  # joblib builds on it too
    """The pickle machine with nothing behind it."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    def __init__(self, source: _Bounded, imports: set[Import]) -> None:
        super().__init__(source, encoding="latin1", buffers=None)
        self._source = source
        self._imports = imports

    def find_class(self, module: str, name: str) -> type[_Anything]:
        self._imports.add((module, name))
        if self.proto < 3:  # loading it will use today's name of what Python 2 had
            here = NAME_MAPPING.get((module, name))
            self._imports.add(here or (IMPORT_MAPPING.get(module, module), name))
        if (module, name) == ("joblib.numpy_pickle", "NDArrayWrapper"):
            message = "it was written by a joblib older than 0.10; save it again"
            raise Unreadable(message)
        return _STAND_INS.get((module, name)) or type("Imported", (_Anything,), {})

    def persistent_load(self, pid: object) -> _Anything:
        del pid
        return _Anything()

    def get_extension(self, code: int) -> None:
        message = f"it uses the registered extension {code}, which nobody can look up"
        raise Unreadable(message)

    def load_build(self) -> None:
        """Set a state; after a joblib wrapper the array's bytes follow, outside the opcodes."""
        super().load_build()
        stack = cast("list[Any]", self.stack)
        if isinstance(stack[-1], _JoblibArray):
            stack[-1].pass_over(self._source, self._imports)
            stack[-1] = _Anything()

    dispatch[pickle.BUILD[0]] = load_build
