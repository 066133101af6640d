"""An answer of the lake, and how it is written down: JSON, CSV, or short texts for a table.

Times are ISO 8601 in UTC. JSON has no word for NaN and the infinities, so they are strings there;
bytes are base64. What holds other values is JSON in CSV and in tables too.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import msgspec

PLAN_COLUMNS = ["step", "plan"]
"""What EXPLAIN gives."""
_LARGEST = 2**63
_LONGEST_CELL = 200
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"
}
"""What clients sent must not act on the terminal of whoever looks at it."""
_encoder = msgspec.json.Encoder(decimal_format="number", enc_hook=str)


@dataclass(slots=True)
class Result:
    """A query's answer; its rows come as they are computed, times without a zone being UTC."""

    columns: list[str]
    types: list[str]
    batches: Iterator[list[tuple[Any, ...]]]


def json_of(result: Result) -> Iterator[bytes]:
    """One array of objects, piece by piece."""
    separator = b"[\n"
    for batch in result.batches:
        for row in batch:
            fields = zip(result.columns, map(_plain, row), strict=True)
            yield separator + _encoder.encode(dict(fields))
            separator = b",\n"
    yield b"\n]\n" if separator == b",\n" else b"[]\n"


def csv_of(result: Result) -> Iterator[bytes]:
    """A header and a line for each row; what has no value is empty."""
    yield _line(result.columns)
    for batch in result.batches:
        yield b"".join(_line([_cell(value) for value in row]) for row in batch)


def cells_of(result: Result) -> Iterator[bytes]:
    """The header and each row as a JSON array of short texts, a line each."""
    yield _encoder.encode(result.columns) + b"\n"
    shown = _cell if result.columns == PLAN_COLUMNS else _shown  # a drawing is shown whole
    for batch in result.batches:
        for row in batch:
            yield _encoder.encode([shown(value) for value in row]) + b"\n"


def _line(cells: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    written = _encoder.encode(_plain(value))
    return msgspec.json.decode(written, type=str) if written.startswith(b'"') else written.decode()


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    text = _cell(value).translate(_CONTROLS)
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"


def _time(value: datetime) -> str:
    return value.replace(tzinfo=UTC).isoformat().replace("+00:00", "Z")


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _integer(value: int) -> Any:
    # msgspec writes no larger integers, and no reader of JSON takes them whole.
    return value if -_LARGEST <= value < 2 * _LARGEST else str(value)


def _mapping(value: dict[Any, Any]) -> dict[str, Any]:
    return {_cell(key): _plain(inner) for key, inner in value.items()}


def _sequence(value: list[Any]) -> list[Any]:
    return [_plain(inner) for inner in value]


_PLAIN: dict[type, Callable[[Any], Any]] = {
    datetime: _time,
    date: date.isoformat,
    float: _float,
    int: _integer,
    dict: _mapping,
    list: _sequence,
    tuple: _sequence,
}


def _plain(value: object) -> Any:
    """The value as JSON can hold it."""
    turn = _PLAIN.get(type(value))
    return value if turn is None else turn(value)
