"""W3C trace context: which trace a request belongs to, and what is passed upstream of it.

As the Recommendation of 23 November 2021 has it. Where we record no span we only pass on what the
client sent; where we do, our span becomes the parent of what happens upstream.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

_MAX_PARENT: Final = 512
_MAX_STATE: Final = 512
_MAX_MEMBERS: Final = 32
_LARGE_MEMBER: Final = 128
_BLANK: Final = b" \t"
_NO_TRACE: Final = b"0" * 32
_NO_PARENT: Final = b"0" * 16
_ODD: Final = b"13579bdf"  # the last digits of flags that have the lowest bit: sampled

_PARENT: Final = re.compile(
    rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x20-\x7e]*)?"
).fullmatch
_MEMBER: Final = re.compile(
    rb"([a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
).fullmatch


class TraceContext(msgspec.Struct, frozen=True, gc=False):
    """Where a request stands in its trace.

    `parent_id` is the client's span, empty where the trace begins with us. `span_id` is our own, 0
    where none is recorded. `header` and `state` are `traceparent` and `tracestate` as they are
    passed on unless we record a span.
    """

    trace_id: str
    parent_id: str
    sampled: bool
    header: bytes
    state: bytes = b""
    span_id: int = 0

    @property
    def recorded(self) -> bool:
        """Whether a span of ours is exported."""
        return self.span_id != 0

    @property
    def traceparent(self) -> str:
        """What a record keeps, so that it is found by its span."""
        return self._parent_header(0).decode()

    def outgoing(self, attempt: int = 0) -> list[tuple[bytes, bytes]]:
        """The headers for a call upstream.

        The parent is our span of the request or, from 1 on, that of the attempt with this number,
        if it is given to `SpanExporter.emit` as such.
        """
        header = self._parent_header(attempt)
        if self.state:
            return [(b"traceparent", header), (b"tracestate", self.state)]
        return [(b"traceparent", header)]

    def span_of(self, attempt: int) -> int:
        """The id of an attempt's span. It follows from the request's: no need to keep any."""
        return (self.span_id + attempt) % 2**64 or 1

    def _parent_header(self, attempt: int) -> bytes:
        if not self.span_id:
            return self.header
        return b"00-%s-%016x-01" % (self.trace_id.encode(), self.span_of(attempt))


def context_of(headers: Mapping[bytes, bytes]) -> TraceContext | None:
    """The context that a client sent, None when there is none or it is invalid.

    A `traceparent` of a later version counts as far as this version knows it. A `tracestate` that
    breaks the rules is left out: no request fails for its tracing.
    """
    raw = headers.get(b"traceparent")
    if raw is None or len(raw) > _MAX_PARENT:
        return None
    raw = raw.strip(_BLANK)
    found = _PARENT(raw)
    if found is None:
        return None
    version, trace, parent, flags, more = found.groups()
    if trace == _NO_TRACE or parent == _NO_PARENT or version == b"ff":
        return None
    if more is not None and version == b"00":
        return None
    state = headers.get(b"tracestate")
    return TraceContext(
        trace.decode(), parent.decode(), flags[1] in _ODD, raw, _checked(state) if state else b""
    )


class Sampler:
    """Decides of which requests a span is recorded.

    Whoever began the trace has decided by its `sampled` flag. Of traces that begin here it is a
    share of `ratio`. `uniform` draws from [0, 1), `bits` so many random bits.
    """

    def __init__(
        self, ratio: float, *, uniform: Callable[[], float], bits: Callable[[int], int]
    ) -> None:
        self._ratio = ratio
        self._uniform = uniform
        self._bits = bits

    def context(self, headers: Mapping[bytes, bytes]) -> TraceContext:
        """The client's context, or a new one; with a span of ours if one is to be recorded."""
        sent = context_of(headers)
        if sent is None:
            return self._begun()
        if not sent.sampled:
            return sent
        span = self._bits(64) or 1
        return TraceContext(
            sent.trace_id, sent.parent_id, sent.sampled, sent.header, sent.state, span
        )

    def _begun(self) -> TraceContext:
        trace = self._bits(128) or 1
        span = self._bits(64) or 1
        sampled = self._uniform() < self._ratio
        header = b"00-%032x-%016x-%02x" % (trace, span, sampled)
        return TraceContext(f"{trace:032x}", "", sampled, header, span_id=span if sampled else 0)


def _checked(state: bytes) -> bytes:
    """A `tracestate` that may be passed on: as it is, shortened, or nothing."""
    state = state.strip(_BLANK)
    members = state.split(b",", _MAX_MEMBERS)
    if len(members) > _MAX_MEMBERS:
        return b""
    keys: set[bytes] = set()
    for member in members:
        stripped = member.strip(_BLANK)
        if stripped:
            found = _MEMBER(stripped)
            if found is None or found[1] in keys:
                return b""
            keys.add(found[1])
    if not keys:
        return b""
    return state if len(state) <= _MAX_STATE else _shortened(members)


def _shortened(members: list[bytes]) -> bytes:
    """Whole members go: first the large ones, then from the end, as the Recommendation asks."""
    kept = [member for member in (one.strip(_BLANK) for one in members) if member]
    for index in range(len(kept) - 1, -1, -1):
        if len(b",".join(kept)) <= _MAX_STATE:
            break
        if len(kept[index]) > _LARGE_MEMBER:
            del kept[index]
    while len(b",".join(kept)) > _MAX_STATE:
        kept.pop()
    return b",".join(kept)
