"""Answers that come as events: passed on one by one, and understood on the way.

Up to its first content a stream can still be given up for another one; from then on the client has
it. Whatever ends it, there is a record of it before the last of it leaves.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from shipworthy.gateway.call import Ask, Call, EventReader, Timing
from shipworthy.gateway.capture import Capture
from shipworthy.gateway.failures import GONE, TEXT
from shipworthy.gateway.http import ClientGone, Request
from shipworthy.gateway.live import LiveArm, LivePlan
from shipworthy.gateway.parts import Parts
from shipworthy.gateway.upstream import (
    EndpointState,
    Outgoing,
    Reply,
    Upstream,
    reply_of,
    reply_to,
    told_on,
)
from shipworthy.gateway.wire import TooLate, Wire, WireError
from shipworthy.protocols.events import EventSplitter, EventTooLarge
from shipworthy.protocols.openai import Seen
from shipworthy.protocols.outcomes import Reason

_EVENT_STREAM: Final = b"text/event-stream"
_BEYOND: Final = 8192
_COMPARED: Final = 256 * 1024  # of a stream whose request is mirrored
_ENDING: Final = "the gateway is ending; ask again"


class OpenStream:
    """A stream from an endpoint whose first content is here, or which has ended without any.

    `held` is what has come of it so far, as the client gets it. `reason` says how it ended, None
    while it goes on; `last` is the event that ends it. `max_event` bounds each event, and
    all that comes before the first content.
    """

    def __init__(
        self,
        upstream: Upstream,
        endpoint: EndpointState,
        wire: Wire,
        reader: EventReader,
        max_event: int,
    ) -> None:
        self.reader = reader
        self.held: list[bytes] = []
        self.reason: Reason | None = None
        self.last = b""
        self.endpoint = endpoint
        self.max_event = max_event
        self._upstream = upstream
        self._wire = wire
        self._splitter = EventSplitter(max_event)
        self._ends: list[Callable[[Reason], None]] = []
        self._over = False

    def on_end(self, tell: Callable[[Reason], None]) -> None:
        """Have somebody told how it ended."""
        self._ends.append(tell)

    def within(self, idle: float, end: float) -> Coroutine[Any, Any, list[bytes]]:
        """`more`, unless it is silent for `idle` seconds, or goes on to the loop's time `end`."""
        silent = asyncio.get_running_loop().time() + idle
        if silent < end:
            return self.more(silent, Reason.IDLE)
        return self.more(end, Reason.TIMEOUT)

    async def more(self, deadline: float, when_late: Reason) -> list[bytes]:
        """The events that come next, none of them when it has ended. `deadline` is the loop's."""
        try:
            data = await self._wire.more(deadline)
            if data:
                return self._absorb(data)
        except TooLate:
            self.reason = when_late
        except WireError:
            self.reason = Reason.BROKEN
        else:  # the answer is over; with a word, if it was meant to be
            rest = self._splitter.rest  # the last event, where its blank line is left out
            passed = self._passed([rest]) if rest else []
            if self.reason is None:
                self.reason = Reason.BROKEN if self.reader.broken_off else Reason.ANSWERED
            return passed
        return []

    def _absorb(self, data: bytes) -> list[bytes]:
        try:
            events = self._splitter.feed(data)
        except EventTooLarge as problem:
            passed = self._passed(problem.before)
            if self.reason is None:
                self.reason = Reason.BROKEN
            return passed
        return self._passed(events)

    def _passed(self, events: list[bytes]) -> list[bytes]:
        """What of these events the client gets."""
        passed: list[bytes] = []
        for event in events:
            if self.reason is not None:
                break
            seen = self.reader.see(event)
            if seen is Seen.DONE:
                self.reason, self.last = Reason.ANSWERED, event
            elif seen is Seen.ERROR:
                self.reason, self.last = Reason.ERROR_EVENT, event
            elif seen is Seen.GARBAGE:
                self.reason = Reason.BROKEN
            elif seen is not Seen.USAGE or self.reader.tells_usage:
                passed.append(self.reader.renamed(event))
        return passed

    def end(self, reason: Reason) -> None:
        """Let go of it, once; a connection that has more to say is closed."""
        if self._over:
            return
        self._over = True
        self.endpoint.outstanding -= 1
        self._upstream.note(self.endpoint, reason)
        if reason is Reason.ANSWERED and self._wire.reusable:
            self.endpoint.pool.give_back(self._wire)
        elif reason is Reason.ANSWERED:
            self._upstream.finish(self.endpoint, self._wire)
        else:
            self._wire.abort()
        for tell in self._ends:
            tell(reason)


class Given(NamedTuple):
    """What an attempt gave: a reply, or a stream whose first content is here."""

    reply: Reply
    endpoint: EndpointState | None = None
    stream: OpenStream | None = None

    @property
    def answered(self) -> bool:
        """Whether the client can be answered with it."""
        return self.reply.reason is Reason.ANSWERED


class Opening(msgspec.Struct, frozen=True):
    """How long an attempt may take, and whose fault it is when it takes longer."""

    connect: float
    seconds: float
    when_late: Reason
    max_event: int


async def open_stream(  # one attempt's circumstances
    upstream: Upstream,
    call: Call,
    arm: LiveArm,
    endpoint: EndpointState,
    ask: Ask,
    outgoing: Outgoing,
    opening: Opening,
    clock: Callable[[], float],
) -> Given:
    """An attempt whose answer is to be a stream: over when its first content is here, or none."""
    deadline = asyncio.get_running_loop().time() + opening.seconds
    endpoint.outstanding += 1
    try:
        wire = await upstream.open(
            endpoint, outgoing, connect_seconds=opening.connect, seconds=opening.seconds
        )
        kind = wire.headers.get(b"content-type", b"")
        if wire.status == 200 and kind.lower().startswith(_EVENT_STREAM):
            reader = ask.reader(arm, call)
            stream = OpenStream(upstream, endpoint, wire, reader, opening.max_event)
        else:
            stream = None
            await wire.rest(limit=upstream.max_response, deadline=deadline)
    except WireError as error:
        stream, reply = None, reply_to(error, opening.when_late)
    except BaseException:
        endpoint.outstanding -= 1
        raise
    else:
        if stream is not None:  # from here on it ends what was begun
            return await _begun(stream, call, wire.headers, deadline, opening.when_late, clock)
        reply = reply_of(wire)
        endpoint.pool.give_back(wire)
    endpoint.outstanding -= 1
    upstream.note(endpoint, reply.reason)
    if reply.reason is Reason.ANSWERED:  # a server that takes no notice of `stream`
        reply = ask.judged(reply, arm, call)
    return Given(reply, endpoint)


async def _begun(  # see open_stream
    stream: OpenStream,
    call: Call,
    headers: dict[bytes, bytes],
    deadline: float,
    when_late: Reason,
    clock: Callable[[], float],
) -> Given:
    """Read up to the first content."""
    try:
        size = 0
        while stream.reason is None and not stream.reader.pieces:
            more = await stream.more(deadline, when_late)
            stream.held += more
            size += sum(map(len, more))
            if size > stream.max_event and not stream.reader.pieces:
                stream.reason = Reason.BROKEN
    except BaseException:
        stream.end(Reason.CLIENT_GONE)
        raise
    reason = stream.reason or Reason.ANSWERED
    if reason is not Reason.ANSWERED and not stream.reader.pieces:
        stream.end(reason)
        return Given(Reply(reason, 200, detail=stream.reader.error), stream.endpoint)
    call.timing = Timing()
    if stream.reader.pieces:
        call.timing.note(clock() - call.started, stream.reader.pieces)
    reply = Reply(
        Reason.ANSWERED, 200, content_type=headers[b"content-type"], extra=told_on(headers)
    )
    return Given(reply, stream.endpoint, stream)


class Streams:
    """Passes streams on to clients."""

    def __init__(self, parts: Parts, capture: Capture) -> None:
        self._capture = capture
        self._metrics = parts.metrics
        self._monotonic = parts.outside.monotonic
        self._slow = parts.options.slow_reader_seconds

    async def pump(
        self,
        request: Request,
        call: Call,
        stream: OpenStream,
        lines: bytes,
        content_type: bytes,
    ) -> None:
        """Send the stream to its end, whatever that is; its record is written just before."""
        client = request.connection
        kept = Kept(call.live)
        reason: Reason | None = None
        self._metrics.streams.inc()
        try:
            client.begin_stream(request, lines, content_type)
            reason = await self._pass_on(request, call, stream, kept)
        except (ClientGone, asyncio.CancelledError):
            reason = Reason.CLIENT_GONE if request.gone() else Reason.SHUTDOWN
        finally:
            if reason is None:  # not `or`: that of an answer is empty text
                reason = Reason.GATEWAY_FAULT
            self._metrics.streams.inc(-1)
            stream.end(reason)
            call.judge(reason)
        last = _last_of(stream, reason)
        kept.add(last)
        call.usage = stream.reader.usage()
        call.response_bytes = kept.size
        if reason is Reason.ANSWERED:
            call.streamed = kept.whole()
        status = GONE if reason is Reason.CLIENT_GONE else 200
        seconds = self._monotonic() - call.started
        self._capture.write(call, status, kept.content(), seconds, digest=kept.digest())
        client.end_stream(last)

    async def _pass_on(
        self, request: Request, call: Call, stream: OpenStream, kept: Kept
    ) -> Reason:
        client, reader = request.connection, stream.reader
        limits = call.live.plan.deadlines
        clock = asyncio.get_running_loop().time
        end = clock() + limits.stream
        passed, stream.held = stream.held, []
        timing = call.timing
        slow = False
        while True:
            if passed:
                data = passed[0] if len(passed) == 1 else b"".join(passed)
                kept.add(data)
                client.send(data)
                slow = client.paused
                if slow:
                    await client.drained(self._slow)
            if stream.reason is not None:
                return stream.reason
            before = reader.pieces
            if clock() >= end:
                return Reason.CLIENT_GONE if slow else Reason.TIMEOUT
            passed = await stream.within(limits.idle, end)
            if reader.pieces > before and timing is not None:
                timing.note(self._monotonic() - call.started, reader.pieces - before)


def _last_of(stream: OpenStream, reason: Reason) -> bytes:
    """What ends it: the server's own word, or the protocol's for an error."""
    if stream.last and reason in (Reason.ANSWERED, Reason.ERROR_EVENT):
        return stream.last
    if reason is Reason.ANSWERED:
        return b""
    return stream.reader.error_event(TEXT.get(reason, _ENDING))


class Digest(Protocol):
    """A hash that is being made."""

    def update(self, data: bytes, /) -> None:
        """Take more."""
        ...

    def hexdigest(self) -> str:
        """What it comes to."""
        ...


class Kept:
    """What is kept of a stream as it passes: its beginning, its size, and a digest if it is cut."""

    def __init__(self, live: LivePlan) -> None:
        rules, mirrored = live.plan.capture, live.mirror is not None
        self.size = 0
        self._keeps = mirrored or rules.payloads != "none"
        # What begins before the limit may have to be replaced as a whole.
        self._limit = rules.max_bytes + (_BEYOND if live.redactor else 0)
        if mirrored:
            self._limit = max(self._limit, _COMPARED)
        self._parts: list[bytes] = []
        self._held = 0
        self._hash: Digest | None = None

    def add(self, data: bytes) -> None:
        """Take a piece."""
        self.size += len(data)
        if not self._keeps or not data:
            return
        if self._hash is not None:
            self._hash.update(data)
        elif self.size > self._limit:
            self._hash = hashlib.sha256(b"".join(self._parts))
            self._hash.update(data)
        if self._held < self._limit:
            self._parts.append(data[: self._limit - self._held])
            self._held += len(data)

    def content(self) -> bytes:
        """As much as is kept."""
        return b"".join(self._parts)

    def whole(self) -> bytes | None:
        """All of it, None when not all is kept."""
        return self.content() if self._held == self.size else None

    def digest(self) -> str | None:
        """The SHA-256 of all of it, if it is not kept as a whole."""
        return None if self._hash is None else self._hash.hexdigest()
