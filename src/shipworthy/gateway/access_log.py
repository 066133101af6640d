"""The access log: one line of JSON for each request.

It names ids, sizes of time and outcomes; never a key, a unit, a query string or a body. What a
client can choose in it, the path, is cut and holds no control characters.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from shipworthy.domain.records import InferenceRecord

_MAX_PATH: Final = 200
_MAX_METHOD: Final = 16
_TRACE: Final = slice(3, 35)  # of a traceparent

_encode: Final = msgspec.json.Encoder().encode


class _Line(msgspec.Struct, gc=False):
    time: datetime
    level: Literal["info", "error"]
    method: str
    path: str
    status: int
    seconds: float


class _CallLine(_Line, gc=False):
    plan: str
    release: str
    serving: str | None
    outcome: str
    reason: str
    input_tokens: int | None
    output_tokens: int | None
    inference: str
    trace: str | None


def access_line(record: InferenceRecord, method: str, path: str, status: int) -> str:
    """The line of a request that reached a plan."""
    parent = record.traceparent
    line = _CallLine(
        datetime.fromtimestamp(record.at, UTC),
        "info" if status < 500 else "error",
        method[:_MAX_METHOD],
        _printable(path),
        status,
        round(record.seconds, 6),
        record.plan,
        record.release,
        record.serving_release,
        record.outcome,
        record.reason,
        record.input_tokens,
        record.output_tokens,
        record.id,
        parent[_TRACE] if parent else None,
    )
    return _encode(line).decode()


def plain_line(at: float, seconds: float, method: str, path: str, status: int) -> str:
    """The line of any other request: refused at the door, or asking after the gateway itself."""
    level = "info" if status < 500 else "error"
    when = datetime.fromtimestamp(at, UTC)
    line = _Line(
        when, level, _printable(method)[:_MAX_METHOD], _printable(path), status, round(seconds, 6)
    )
    return _encode(line).decode()


def _printable(path: str) -> str:
    """The path without its query string, which may hold a secret, and as ASCII."""
    path = path[:_MAX_PATH].partition("?")[0]
    if path.isascii() and path.isprintable():
        return path
    return path.encode("unicode_escape").decode()[:_MAX_PATH]
