"""Tensor values in JSON: how each datatype is read, and in which words a value is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Annotated, Any, Final, cast

import msgspec
from msgspec import Meta

from shipworthy.protocols.messages import InvalidMessage

_SHOWN = 80  # characters of a client's own text that an error message repeats


class ContractViolation(InvalidMessage):
    """Well formed, but not what this model's contract declares."""


# --- reading ----------------------------------------------------------------------------------

_FP16_MAX = 65504.0
_FP32_MAX = 3.4028234663852886e38


def _between(low: int, high: int) -> Any:
    return Annotated[int, Meta(ge=low, le=high)]


ELEMENTS: Final[dict[str, Any]] = {
    "BOOL": bool,
    "UINT8": _between(0, 2**8 - 1),
    "UINT16": _between(0, 2**16 - 1),
    "UINT32": _between(0, 2**32 - 1),
    "UINT64": Annotated[int, Meta(ge=0)],  # msgspec's bounds end at 63 bits: see check_64_bits
    "INT8": _between(-(2**7), 2**7 - 1),
    "INT16": _between(-(2**15), 2**15 - 1),
    "INT32": _between(-(2**31), 2**31 - 1),
    "INT64": int,
    "FP16": Annotated[float, Meta(ge=-_FP16_MAX, le=_FP16_MAX)],
    "FP32": Annotated[float, Meta(ge=-_FP32_MAX, le=_FP32_MAX)],
    "FP64": float,
    "BYTES": str,
}
"""What msgspec reads for each datatype."""
WANTED: Final[dict[str, str]] = {
    "BOOL": "true or false",
    "UINT8": "an integer from 0 to 255",
    "UINT16": "an integer from 0 to 65535",
    "UINT32": "an integer from 0 to 4294967295",
    "UINT64": "an integer from 0 to 18446744073709551615",
    "INT8": "an integer from -128 to 127",
    "INT16": "an integer from -32768 to 32767",
    "INT32": "an integer from -2147483648 to 2147483647",
    "INT64": "an integer from -9223372036854775808 to 9223372036854775807",
    "FP16": "a number from -65504 to 65504",
    "FP32": "a number that fits 32 bits",
    "FP64": "a number that fits 64 bits",
    "BYTES": "a string",
}
"""What a message of ours calls it."""
INT64: Final = {"UINT64": (0, 2**64 - 1), "INT64": (-(2**63), 2**63 - 1)}
"""The types that msgspec can't bound: `check_64_bits` does."""


DATA_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder of data raises; `data_problem` says it in our words."""


@cache
def decoder_of(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    """Reads lists of this type, nested `depth` deep."""
    kind: Any = ELEMENTS[datatype]
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


# --- checking ---------------------------------------------------------------------------------


def check_nesting(field: str, values: list[Any], shape: tuple[int, ...]) -> None:
    """ContractViolation for the first list whose length is not what the shape says."""
    if not _is_nested(values, shape):
        _find_misfit(field, values, shape)


def _is_nested(values: list[Any], shape: Sequence[int]) -> bool:
    """What `_find_misfit` says, without naming who is at fault, and so many times faster.

    A million short rows would hold up everybody else's requests for seconds.
    """
    if len(values) != shape[0]:
        return False
    last = len(shape) - 1
    for depth in range(1, len(shape)):
        if set(map(len, values)) != {shape[depth]}:
            return False
        if depth < last:
            values = list(chain.from_iterable(values))
    return True


def _find_misfit(field: str, values: list[Any], shape: tuple[int, ...]) -> None:
    if len(values) != shape[0]:
        raise ContractViolation(
            f"{field}: expected {shape[0]} entries as the shape says, got {len(values)}"
        )
    if len(shape) > 1:
        for index, inner in enumerate(values):
            _find_misfit(f"{field}[{index}]", inner, shape[1:])


def check_64_bits(field: str, values: list[Any], datatype: str) -> None:
    """ContractViolation for the first integer beyond 64 bits, which msgspec can't bound."""
    if datatype not in INT64:
        return
    low, high = INT64[datatype]
    if values and isinstance(values[0], int) and low <= min(values) and max(values) <= high:
        return
    for index, value in enumerate(values):
        if isinstance(value, list):
            check_64_bits(f"{field}[{index}]", cast("list[Any]", value), datatype)
        elif not low <= value <= high:
            raise ContractViolation(
                f"{field}[{index}]: expected {WANTED[datatype]}, got a value out of range"
            )


# --- words ------------------------------------------------------------------------------------

_AT = re.compile(r" - at `\$\.?(.*)`$")
_GOT = re.compile(r"got `([^`]*)`")


def data_problem(field: str, error: Exception, datatype: str) -> str:
    """A decoder's error as the field, what was expected there and what came."""
    at = _AT.search(str(error))
    where = f"{field}{at.group(1) if at else ''}"
    return f"{where}: {expectation(error, datatype, listed=at is None)}"


def expectation(error: Exception, datatype: str, *, listed: bool = False) -> str:
    """What a decoder expected and what came, wherever that was; `listed`: it wanted a list."""
    if isinstance(error, UnicodeDecodeError):
        return "a string is not valid UTF-8"
    text = str(error)
    got = _GOT.search(text)
    if text.startswith("JSON is malformed"):
        return f"not JSON: {text.removeprefix('JSON is malformed: ')}"
    if got is None:
        return f"expected {WANTED[datatype]}, got a value out of range"
    if listed or text.startswith("Expected `array`"):
        return f"expected an array, got {_json_word(got.group(1))}"
    return f"expected {WANTED[datatype]}, got {_json_word(got.group(1))}"


def _json_word(kind: str) -> str:
    words = {"int": "an integer", "float": "a number with a fraction", "str": "a string"}
    more = {"bool": "true or false", "array": "an array", "object": "an object", "null": "null"}
    return (words | more).get(kind, kind)


def shortened(text: str) -> str:
    """As much of a client's text as an error repeats."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def quoted(name: str) -> str:
    """A client's name for something, with control characters escaped."""
    return msgspec.json.encode(shortened(name)).decode()
