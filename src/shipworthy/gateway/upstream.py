"""Calls to the servers of a release: one attempt at one endpoint, and which endpoint that is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from shipworthy.domain.contract import Protocol
from shipworthy.gateway.credentials import bearer
from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.wire import (
    Broken,
    NoConnectionInTime,
    Origin,
    Pool,
    TooLate,
    Unreachable,
    Wire,
    WireError,
)
from shipworthy.protocols.oip_binary import speaks_binary
from shipworthy.protocols.outcomes import Reason, reason_of_status

_log = logging.getLogger("shipworthy.gateway")

_SOUND = frozenset({Reason.ANSWERED, Reason.REFUSED})
"""The endpoint did its work, whatever it said."""
_NEUTRAL = frozenset(
    {
        Reason.OVERLOADED, Reason.CLIENT_DEADLINE, Reason.GATEWAY_FAULT, Reason.CLIENT_GONE,
        Reason.SHUTDOWN,
    }
)  # fmt: skip
"""Says nothing about whether it can: a busy server is not made faster by being left alone."""
_HEALTH: Final[dict[Protocol, str]] = {
    "oip-v2": "/v2/health/ready",
    "mlflow": "/ping",
    "openai": "/models",
}
_PROBE_SECONDS: Final = 2.0
_FINISH_SECONDS: Final = 1.0  # for the end of a stream behind its last event
_FINISH_BYTES: Final = 64 * 1024
_TOLD_ON: Final = (b"x-request-id", b"openai-processing-ms")


class Outgoing(msgspec.Struct, frozen=True):
    """A request as it is sent to a release: the path below the endpoint's address, and the rest.

    `headers` are whole lines, each with its end.
    """

    path: str
    body: bytes
    content_type: bytes = b"application/json"
    headers: bytes = b""


class Reply(msgspec.Struct, frozen=True):
    """How one attempt ended. `body` is the answer's if there was one, of whatever status.

    `sent` says whether the endpoint may have seen the request; `detail` what was wrong with it.
    `headers` are the answer's, those that matter; `extra` and `content_type` are for the client.
    """

    reason: Reason
    status: int = 0
    body: bytes = b""
    sent: bool = True
    detail: str = ""
    headers: dict[bytes, bytes] = {}
    content_type: bytes = b"application/json"
    extra: tuple[tuple[bytes, bytes], ...] = ()


class Speech:
    """What the servers of a release were found to understand beyond the least.

    `binary` are tensors in binary; `wanted` says that it matters, and nobody has asked yet.
    """

    __slots__ = ("asked", "asking", "binary", "wanted")

    def __init__(self) -> None:
        self.binary = self.wanted = self.asked = False
        self.asking: asyncio.Task[None] | None = None

    @property
    def open(self) -> bool:
        """Whether it matters, and is not known yet."""
        return self.wanted and (self.asking is None or not (self.asked and self.asking.done()))


class EndpointState:
    """One server as this worker knows it: calls under way, failures in a row, whether set aside."""

    def __init__(
        self,
        url: str,
        credential: str | None,
        options: GatewayOptions,
        *,
        protocol: Protocol = "oip-v2",
        concurrency: int | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.outstanding = 0
        self.ejected = False
        self.most = _share(concurrency, options)
        self.pool = Pool(Origin(url))
        self._protocol: Protocol = protocol
        self._credential = credential
        self._heads: dict[str, bytes] = {}
        self._failures = 0
        self._ejections = 0
        self._eject_after = options.eject_after
        self._eject_seconds = options.eject_seconds
        self._max_eject_seconds = options.max_eject_seconds

    @property
    def has_room(self) -> bool:
        """Whether it may be asked now, as far as its concurrency goes."""
        return self.most is None or self.outstanding < self.most

    def message(self, outgoing: Outgoing) -> bytes:
        """The request as it goes over the wire."""
        head = self._heads.get(outgoing.path)
        if head is None:
            if len(self._heads) > 64:
                self._heads.clear()
            head = self._heads[outgoing.path] = self._head("POST", outgoing.path)
        return b"%scontent-type: %s\r\ncontent-length: %d\r\n%s\r\n%s" % (
            head,
            outgoing.content_type,
            len(outgoing.body),
            outgoing.headers,
            outgoing.body,
        )

    def health_message(self) -> bytes:
        """How its health is asked for."""
        return self._head("GET", _HEALTH[self._protocol]) + b"\r\n"

    def metadata_message(self) -> bytes:
        """How it is asked which extensions it speaks."""
        return self._head("GET", "/v2") + b"\r\n"

    def _head(self, method: str, path: str) -> bytes:
        origin = self.pool.origin
        base = origin.path
        if self._protocol == "openai" and not base:
            base = "/v1"
        lines = [f"{method} {base}{path} HTTP/1.1", f"host: {origin.authority}"]
        lines += [f"{name}: {value}" for name, value in bearer(self._credential).items()]
        return "\r\n".join([*lines, ""]).encode("latin-1")

    def note(self, reason: Reason) -> float | None:
        """Count an attempt's end; seconds to stay away from now on, or None."""
        if reason in _SOUND:
            self._failures = self._ejections = 0
            return None
        if reason in _NEUTRAL:
            return None
        self._failures += 1
        if self.ejected or self._failures < self._eject_after:
            return None
        self.ejected = True
        pause = min(self._eject_seconds * 2**self._ejections, self._max_eject_seconds)
        self._ejections = min(self._ejections + 1, 30)
        return pause

    def readmit(self) -> None:
        """Take it back, on trial: the next failure sets it aside again, for longer."""
        self.ejected = False
        self._failures = self._eject_after - 1


def _share(concurrency: int | None, options: GatewayOptions) -> int | None:
    """How many of an endpoint's calls are this worker's: all workers' together are all of them.

    Each has one at least.
    """
    if concurrency is None:
        return None
    whole, left = divmod(concurrency, options.workers)
    return max(1, whole + (options.worker_index < left))


def pick(
    endpoints: tuple[EndpointState, ...], turn: int, avoid: EndpointState | None = None
) -> EndpointState | None:
    """The endpoint with the fewest calls under way, of those not set aside; ties go round by turn.

    When all are set aside they are all tried: an answer from a doubtful server beats none. None
    when each has as many calls as it may.
    """
    if len(endpoints) == 1:
        only = endpoints[0]
        return only if only.has_room else None
    able = [one for one in endpoints if not one.ejected] or list(endpoints)
    able = [one for one in able if one.has_room]
    if avoid is not None and len(able) > 1:
        able = [one for one in able if one is not avoid]
    if not able:
        return None
    least = min(one.outstanding for one in able)
    free = [one for one in able if one.outstanding == least]
    return free[turn % len(free)]


class Upstream:
    """Asks endpoints, and sets those aside that keep failing. Use it as a context manager.

    `ejected` is called with the endpoint's URL when it is set aside.
    """

    def __init__(self, options: GatewayOptions, ejected: Callable[[str], None]) -> None:
        self.max_response = options.max_response
        self._options = options
        self._ejected = ejected
        self._probes: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for probe in self._probes:
            probe.cancel()

    async def ask(
        self,
        endpoint: EndpointState,
        outgoing: Outgoing,
        *,
        connect_seconds: float,
        seconds: float,
        when_late: Reason = Reason.TIMEOUT,
    ) -> Reply:
        """One attempt, over after `seconds`; every way in which it can end is a Reply.

        `when_late` is the reason if the time runs out: it may have been the client's to set.
        """
        now = asyncio.get_running_loop().time()
        deadline = now + seconds
        endpoint.outstanding += 1
        try:
            wire = endpoint.pool.kept(now)
            if wire is None:
                wire = await self._take(endpoint, connect_seconds, seconds)
            await wire.ask(
                endpoint.message(outgoing), limit=self._options.max_response, deadline=deadline
            )
            reply = reply_of(wire)
            endpoint.pool.give_back(wire)
        except WireError as error:
            reply = reply_to(error, when_late)
        finally:
            endpoint.outstanding -= 1
        self.note(endpoint, reply.reason)
        return reply

    async def open(
        self, endpoint: EndpointState, outgoing: Outgoing, *, connect_seconds: float, seconds: float
    ) -> Wire:
        """Begin an attempt whose answer may be a stream: over when the answer's head is here.

        Raises WireError. Whoever calls it counts the call as outstanding, tells how it ended by
        `note`, and gives the connection back.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        wire = await self._take(endpoint, connect_seconds, seconds)
        await wire.ask(
            endpoint.message(outgoing),
            limit=self._options.max_response,
            deadline=deadline,
            whole=False,
        )
        return wire

    def learn(self, endpoint: EndpointState, speech: Speech) -> None:
        """Find out, behind what is going on, which extensions a release's servers speak."""
        if not speech.asked:
            speech.asked = True
            speech.asking = self._in_background(self._asked_for_speech(endpoint, speech))

    async def learned(self, endpoint: EndpointState, speech: Speech) -> bool:
        """Find it out now, where a request can't be sent before; False when it can't be had."""
        self.learn(endpoint, speech)
        if speech.asking is not None:
            await asyncio.wait([speech.asking])
        return speech.asked

    async def _asked_for_speech(self, endpoint: EndpointState, speech: Speech) -> None:
        wire = await self._got(endpoint, endpoint.metadata_message())
        if wire is not None and wire.status == 200:
            speech.binary = speaks_binary(wire.body())
        speech.wanted = False
        speech.asked = wire is not None

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)
        return task

    def finish(self, endpoint: EndpointState, wire: Wire) -> None:
        """Let an answer whose last word is known end, so that its connection can be used again."""
        if wire.lost:
            return
        self._in_background(_finished(endpoint, wire))

    def note(self, endpoint: EndpointState, reason: Reason) -> None:
        """Count how an attempt ended; enough failures in a row set the endpoint aside."""
        pause = endpoint.note(reason)
        if pause is not None:
            self._set_aside(endpoint, pause)

    @staticmethod
    async def _take(endpoint: EndpointState, connect_seconds: float, seconds: float) -> Wire:
        try:
            return await endpoint.pool.take(min(connect_seconds, seconds))
        except NoConnectionInTime:
            if seconds < connect_seconds:
                raise TooLate from None
            raise

    def _set_aside(self, endpoint: EndpointState, pause: float) -> None:
        _log.warning("endpoint %s keeps failing and is set aside for %g s", endpoint.url, pause)
        self._ejected(endpoint.url)
        self._in_background(self._readmit(endpoint, pause))

    async def _readmit(self, endpoint: EndpointState, pause: float) -> None:
        """Ask for its health until it has some, then take it back; unless no plan names it now."""
        await asyncio.sleep(pause)
        while not endpoint.pool.closed and not await self._healthy(endpoint):
            pause = min(2 * pause, self._options.max_eject_seconds)
            await asyncio.sleep(pause)
        endpoint.readmit()

    async def _healthy(self, endpoint: EndpointState) -> bool:
        """Whether it answers at all; a server without a health route is well if it says so."""
        wire = await self._got(endpoint, endpoint.health_message())
        return wire is not None and wire.status < 500

    @staticmethod
    async def _got(endpoint: EndpointState, message: bytes) -> Wire | None:
        """A small answer's connection, already given back; None without an answer."""
        deadline = asyncio.get_running_loop().time() + _PROBE_SECONDS
        try:
            wire = await endpoint.pool.take(_PROBE_SECONDS)
            await wire.ask(message, limit=1024 * 1024, deadline=deadline)
        except WireError:
            return None
        endpoint.pool.give_back(wire)
        return wire


async def _finished(endpoint: EndpointState, wire: Wire) -> None:
    deadline = asyncio.get_running_loop().time() + _FINISH_SECONDS
    try:
        await wire.rest(limit=_FINISH_BYTES, deadline=deadline)
    except WireError:
        return
    endpoint.pool.give_back(wire)


def reply_of(wire: Wire) -> Reply:
    """The answer that a connection has got, if it is one that can be read."""
    headers = wire.headers
    if headers.get(b"content-encoding", b"identity") != b"identity":
        return Reply(Reason.BROKEN, wire.status, detail="it is compressed, which nobody asked for")
    return Reply(reason_of_status(wire.status), wire.status, wire.body(), headers=headers)


def told_on(headers: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """What a server's head says of this one answer: how to ask its owner about it, and its time.

    All else in it is about the server, its owner's account and its limits, which are not the
    client's.
    """
    return tuple([(name, headers[name]) for name in _TOLD_ON if name in headers])


def reply_to(error: WireError, when_late: Reason = Reason.TIMEOUT) -> Reply:
    """What an attempt comes to that ended without an answer."""
    if isinstance(error, Unreachable):
        return Reply(Reason.GATEWAY_FAULT if error.ours else Reason.UNREACHABLE, sent=False)
    if isinstance(error, NoConnectionInTime):
        return Reply(Reason.CONNECT_TIMEOUT, sent=False)
    if isinstance(error, Broken):
        return Reply(Reason.BROKEN)
    return Reply(when_late)
