r"""Tensor values as bytes, the way the binary extension carries them.

Little-endian and row-major without padding; a BOOL is one byte, a BYTES element its length in four
bytes and then itself. What only passes through stays as it came: `Packed` checks sizes and looks
into the values when somebody asks for them.

    >>> Packed("INT16", pack("INT16", [[1, 2], [3, 4]])).tolist()
    [1, 2, 3, 4]
    >>> Packed("BYTES", pack("BYTES", ["a", ""])).raw.tobytes()
    b'\x01\x00\x00\x00a\x00\x00\x00\x00'
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Final, cast

from shipworthy.domain.contract import Datatype

_CODES: Final = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
_SIZES: Final = {datatype: struct.calcsize("<" + code) for datatype, code in _CODES.items()}
_FLOATS: Final = frozenset({"FP16", "FP32", "FP64"})
_LENGTH: Final = struct.Struct("<I")


class Packed:
    """A tensor's values as bytes; `raw` is a view of the message that they came in."""

    __slots__ = ("datatype", "raw")

    def __init__(self, datatype: Datatype, raw: bytes | memoryview) -> None:
        self.datatype: Final = datatype
        self.raw: Final = memoryview(raw)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Packed):
            return NotImplemented
        return self.datatype == other.datatype and self.raw == other.raw

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # the view's owner may change it

    def __repr__(self) -> str:
        return f"Packed({self.datatype!r}, {len(self.raw)} bytes)"

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def tolist(self) -> list[Any]:
        """The values, flat; those of BYTES as str, UnicodeDecodeError where they are none."""
        if self.datatype == "BYTES":
            return [str(text, "utf-8") for text in self._elements()]
        count = len(self.raw) // _SIZES[self.datatype]
        return list(struct.unpack(f"<{count}{_CODES[self.datatype]}", self.raw))

    def problem(self, count: int) -> str | None:
        """Why these are not `count` values of the type, or None when they are."""
        if self.datatype == "BYTES":
            return self._elements_problem(count)
        size = _SIZES[self.datatype]
        if len(self.raw) != count * size:
            return f"expected {count} values of {size} bytes each, got {len(self.raw)} bytes"
        if self.datatype == "BOOL" and bytes(self.raw).translate(None, b"\0\1"):
            index = next(at for at, byte in enumerate(self.raw) if byte > 1)
            return f"expected a byte 0 or 1 per value, got {self.raw[index]} at index {index}"
        return None

    def json_problem(self) -> str | None:
        """Which value JSON can't carry, or None when it can carry all."""
        if self.datatype == "BYTES":
            for index, text in enumerate(self._elements()):
                try:
                    str(text, "utf-8")
                except UnicodeDecodeError:
                    return f"the value at index {index} is not UTF-8 text"
        elif self.datatype in _FLOATS:
            values = self.tolist()
            if not all(map(math.isfinite, values)):
                index = next(at for at, one in enumerate(values) if not math.isfinite(one))
                return f"the value at index {index} is {values[index]}"
        return None

    def _elements(self) -> Iterator[memoryview]:
        raw, offset, total = self.raw, 0, len(self.raw)
        while offset < total:
            start = offset + 4
            offset = start + _LENGTH.unpack_from(raw, offset)[0]
            yield raw[start:offset]

    def _elements_problem(self, count: int) -> str | None:
        raw, total = self.raw, len(self.raw)
        offset = found = 0
        unpack = _LENGTH.unpack_from
        while offset + 4 <= total and found < count:
            offset += 4 + unpack(raw, offset)[0]
            found += 1
        if offset > total:
            return f"the value at index {found - 1} ends {offset - total} bytes beyond the data"
        if found < count:
            return f"expected {count} values, got {found} and {total - offset} bytes more"
        if offset < total:
            return f"expected {count} values, got {total - offset} bytes after the last"
        return None


def pack(datatype: Datatype, data: Any) -> bytes | memoryview:
    """Values as bytes: Packed ones as they are, or such that the type can hold, flat or nested."""
    if isinstance(data, Packed):
        return data.raw
    flat: list[Any] = flattened(data.tolist() if hasattr(data, "tolist") else data)
    if datatype == "BYTES":
        texts = [text.encode() for text in cast("list[str]", flat)]
        return b"".join(chain.from_iterable((_LENGTH.pack(len(text)), text) for text in texts))
    return struct.pack(f"<{len(flat)}{_CODES[datatype]}", *flat)


def flattened(data: Any) -> list[Any]:
    """The values of a nested list, in order."""
    while data and isinstance(data[0], list):
        data = list(chain.from_iterable(data))
    return data


def nested(flat: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """Flat values as lists within lists, as the shape says; a scalar for the shape `()`."""
    if not shape:
        return flat[0]
    for depth in range(len(shape) - 1, 0, -1):
        size = shape[depth]
        starts = range(0, math.prod(shape[:depth]) * size, size) if size else ()
        flat = [flat[start : start + size] for start in starts]
    return flat
