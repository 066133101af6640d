"""HTTP/1.1 to the servers of releases: connections that are kept, asked one thing at a time.

Written on httptools' parser itself, for the same reason as the client's side. A connection is only
kept while its server can be trusted to have said all that it had to say.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from functools import cache
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

KEEP_ALIVE_SECONDS: Final = 1.5
"""Shorter than any common server's, so that a request never meets a connection being closed: such a
reset would look like the release's failure, more often on the arm with less traffic."""
_MAX_AGE_SECONDS: Final = 60.0  # then its name is looked up again
_MAX_HEAD: Final = 64 * 1024
_AHEAD: Final = 256 * 1024  # what is read of an answer before somebody asks for it
_MAX_KEPT: Final = 512
_KEPT_HEADERS: Final = frozenset(
    {
        b"content-type", b"content-length", b"content-encoding", b"transfer-encoding",
        b"retry-after", b"inference-header-content-length",
        b"x-request-id", b"openai-processing-ms",
    }
)  # fmt: skip
OWN_LACKS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL}
)
"""Why this worker itself can't open a connection: no release has anything to do with it."""


class WireError(Exception):
    """A server could not be asked, or did not answer as HTTP says."""


class Unreachable(WireError):
    """No connection; nothing was sent. `ours` says that this machine is to blame."""

    def __init__(self, message: str, *, ours: bool = False) -> None:
        super().__init__(message)
        self.ours = ours


class NoConnectionInTime(WireError):
    """No connection within the time for it; nothing was sent."""


class TooLate(WireError):
    """No answer, or not all of it, in time."""


class Broken(WireError):
    """What came is not HTTP, ends too early, or is larger than allowed."""


class Origin:
    """A server: scheme, host and port, and the path that all of its addresses begin with."""

    __slots__ = ("authority", "host", "path", "port", "secure")

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        self.secure = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = port or (443 if self.secure else 80)
        self.path = parts.path.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = host if port is None else f"{host}:{port}"


class Wire(asyncio.Protocol):
    """One connection to a server.

    `ask`, then either `rest` for the whole answer, or `more` for piece after piece. `status` and
    `headers` (those that matter) are known from when `ask` is over with `head_only`.
    """

    __slots__ = (
        "_broken", "_complete", "_deadline", "_due", "_head_bytes", "_headed", "_lasting", "_limit",
        "_loop", "_parser", "_parts", "_paused", "_size", "_timer", "_transport", "_unheaded",
        "_until_close", "_waiter", "_whole", "born", "headers", "idle_since", "lost", "status",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lost = False
        self.born = self.idle_since = loop.time()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._loop = loop
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # from the first event
        self._parser: Any = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._whole = True  # whether the waiter waits for the whole answer
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = self._due = 0.0  # when it is late, and when the timer goes off
        self._limit = 0
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers = {}
        self._parts: list[bytes] = []
        self._size = self._head_bytes = self._unheaded = 0
        self._headed = self._complete = self._paused = False
        self._until_close = self._lasting = False
        self._broken = ""

    # --- events -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is open."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Feed the parser; whatever comes unasked ends the connection."""
        if self._complete or not self._limit:
            self._lasting = False
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._break("what it sent is not HTTP")
            return
        if not self._headed:
            self._unheaded += len(data)
            if self._unheaded > _MAX_HEAD:
                self._break("its headers are too large")
        elif not self._whole and (self._parts or self._complete):
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed: the end of an answer that has no other, else too early."""
        self.lost = True
        self._rest_timer()
        if self._complete:
            return
        if exc is None and self._headed and self._until_close:
            self._complete = True
        elif not self._broken:
            self._broken = "the connection was closed before the answer ended"
        self._wake()

    # --- parser -----------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep those that matter; what comes behind a body is none of them."""
        if self._headed:
            return
        self._head_bytes += len(name) + len(value)
        name = name.lower()
        if name in _KEPT_HEADERS:
            self.headers[name] = value

    def on_headers_complete(self) -> None:
        """The answer begins, unless it is one that announces another, or one behind it."""
        if self._complete:
            raise Broken
        self.status = self._parser.get_status_code()
        if self.status < 200:
            return
        self._headed = True
        headers = self.headers
        self._until_close = b"content-length" not in headers and b"transfer-encoding" not in headers
        if self._head_bytes > _MAX_HEAD:
            raise Broken
        length = headers.get(b"content-length")
        if self._whole and length is not None and int(length) > self._limit:
            raise Broken
        if not self._whole:
            self._wake()

    def on_body(self, body: bytes) -> None:
        """Keep a piece; stop reading when nobody takes them."""
        self._parts.append(body)
        self._size += len(body)
        if self._whole:
            if self._size > self._limit:
                raise Broken
        elif self._size > _AHEAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The answer is here, and the connection may be used again."""
        if self.status < 200:
            self.headers = {}
            return
        self._complete = True
        self._lasting = self._parser.should_keep_alive() and not self._until_close
        self._wake()

    # --- asking -----------------------------------------------------------------------------

    async def ask(self, message: bytes, *, limit: int, deadline: float, whole: bool = True) -> None:
        """Send a request; over when its answer is here, or its head unless `whole`.

        `limit` bounds the answer's bytes, `deadline` is the loop's time. Raises WireError; then, as
        when it is cancelled, the connection is of no more use.
        """
        if self.lost:
            raise Unreachable("the connection was closed")
        self._reset()
        self._limit = limit
        self._whole = whole
        self._transport.write(message)
        await self._until(deadline)

    async def rest(self, *, limit: int, deadline: float) -> None:
        """Wait for all that is left of the answer; `body` then has it."""
        self._whole, self._limit = True, limit
        if self._size > limit:
            self._break("it is larger than allowed")
        self._unpause()
        if not self._complete:
            await self._until(deadline)

    async def more(self, deadline: float) -> bytes:
        """The next piece of the answer, as it came; empty at its end."""
        if not self._parts and not self._complete:
            await self._until(deadline)
        taken = self._taken()
        self._unpause()
        return taken

    def body(self) -> bytes:
        """The whole answer, once `ask` is over."""
        return self._taken()

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent on it: the last one went out and was answered."""
        return (
            self._complete
            and self._lasting
            and not self._paused
            and not self.lost
            and not self._transport.get_write_buffer_size()
        )

    def abort(self) -> None:
        """Close it at once."""
        self._lasting = False
        self._transport.abort()

    def _taken(self) -> bytes:
        parts = self._parts
        self._parts = []
        self._size = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unpause(self) -> None:
        if self._paused and not self.lost:
            self._paused = False
            self._transport.resume_reading()

    async def _until(self, deadline: float) -> None:
        """Wait for the next event, whatever it is."""
        if self._broken or self.lost:
            raise Broken(self._broken or "the connection was closed")
        waiter = self._waiter = self._loop.create_future()
        self._deadline = deadline
        if self._timer is None or deadline < self._due:
            self._set_timer(deadline)
        try:
            await waiter
        except asyncio.CancelledError:
            self._rest_timer()
            self.abort()
            raise
        self._waiter = None
        if self._complete or self._whole:
            self._rest_timer()
        if self._broken:
            raise (TooLate if self._broken == _LATE else Broken)(self._broken)

    def _is_late(self) -> None:
        self._timer = None
        if self._deadline > self._loop.time() + 0.001:  # it has moved on since
            self._set_timer(self._deadline)
        elif self._waiter is not None:
            self._break(_LATE)

    def _set_timer(self, due: float) -> None:
        """Have a look then; a deadline that moves on later costs no other timer."""
        self._rest_timer()
        self._due = due
        self._timer = self._loop.call_at(due, self._is_late)

    def _rest_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _break(self, why: str) -> None:
        if not self._complete:
            self._broken = why
        self.abort()
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            if self._whole and not (self._complete or self._broken):
                return
            waiter.set_result(None)


_LATE: Final = "no answer in time"


class Pool:
    """The connections to one server.

    Nothing is opened ahead, and what was idle for long is not used. Once it is `closed` nothing is
    kept any more.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.closed = False
        self._idle: list[Wire] = []

    def kept(self, now: float) -> Wire | None:
        """A connection that was kept, if there is one; `now` is the loop's time."""
        while self._idle:
            wire = self._idle.pop()
            if (
                not wire.reusable
                or now - wire.idle_since > KEEP_ALIVE_SECONDS
                or now - wire.born > _MAX_AGE_SECONDS
            ):
                wire.abort()
                continue
            return wire
        return None

    async def take(self, connect_seconds: float) -> Wire:
        """A connection, kept or new. Raises Unreachable or NoConnectionInTime."""
        loop = asyncio.get_running_loop()
        return self.kept(loop.time()) or await self._connect(loop, connect_seconds)

    def give_back(self, wire: Wire) -> None:
        """Keep it for the next request, if it can be."""
        if wire.reusable and len(self._idle) < _MAX_KEPT and not self.closed:
            wire.idle_since = asyncio.get_running_loop().time()
            self._idle.append(wire)
        else:
            wire.abort()

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long."""
        kept: list[Wire] = []
        for wire in self._idle:
            if wire.lost or now - wire.idle_since > KEEP_ALIVE_SECONDS:
                wire.abort()
            else:
                kept.append(wire)
        self._idle = kept

    def close(self) -> None:
        """Close what is idle; calls that are under way end as they would."""
        self.closed = True
        for wire in self._idle:
            wire.abort()
        self._idle.clear()

    async def _connect(self, loop: asyncio.AbstractEventLoop, seconds: float) -> Wire:
        origin = self.origin
        secure: dict[str, Any] = {}
        if origin.secure:
            secure = {"ssl": tls(), "server_hostname": origin.host}
        try:
            async with asyncio.timeout(seconds):
                return await connect(lambda: Wire(loop), origin.host, origin.port, **secure)
        except TimeoutError:
            raise NoConnectionInTime(origin.authority) from None
        except OSError as error:  # name resolution and TLS included
            ours = error.errno in OWN_LACKS
            raise Unreachable(f"{origin.authority}: {error}", ours=ours) from None
        except (ValueError, UnicodeError) as error:
            raise Unreachable(f"{origin.authority}: {error}") from None


async def connect(make: Callable[[], Wire], host: str, port: int, **secure: Any) -> Wire:
    """Open a connection; `secure` is what the event loop wants to know for TLS."""
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_connection(make, host, port, **secure)
    return wire


@cache
def tls() -> ssl.SSLContext:
    """How servers are checked: by the certificates that this machine trusts (SSL_CERT_FILE)."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
