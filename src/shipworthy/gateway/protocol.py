"""uvicorn's HTTP protocol with limits: a client can hold a connection, some memory and no more.

What uvicorn leaves open is closed here: the size and number of headers, the time that a client may
take to send them, the number of connections, and the end of a request that nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.options import GatewayOptions
from shipworthy.protocols.oip import error_body

_LINGER_SECONDS: Final = 1.0
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_LINGER_BYTES: Final = 4 * 1024 * 1024


class _RefusedHead(Exception):
    """Raised in a callback to stop the parser; the refusal is in the protocol."""


class GatewayProtocol(HttpToolsProtocol):
    """One client connection.

    `lost` says that it is closed. Its current request's task is cancelled when that happens before
    the answer is out, so that no upstream works for nobody.
    """

    def __init__(
        self,
        config: Config,
        state: ServerState,
        *,
        options: GatewayOptions,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config=config, server_state=state, app_state={}, _loop=loop)
        self.access_log = False
        self.lost = False
        self._options = options
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None
        self._running: RequestResponseCycle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0  # received since the last message's end, body aside
        self._refusal: tuple[int, str] | None = None
        self._lingered: int | None = None
        self._outlet = _Outlet(self)

    # --- connection -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many already; the client has to say what it wants soon."""
        super().connection_made(transport)
        self._outlet.attach(transport)
        if len(self.connections) > 2 * self._options.max_connections:
            transport.abort()
        elif len(self.connections) > self._options.max_connections:
            self._refuse(503, "the gateway has as many connections as it may", "too_many")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the work that was being done for it."""
        self.lost = True
        self._stop_head_timer()
        super().connection_lost(exc)
        self._drop_request()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, watching how much of a head there is without its end."""
        if self._lingered is not None:
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        if self._in_head:
            self._head_bytes += len(data)
        if self.parser is None:  # data after the connection was lost
            return
        try:
            self._feed(data)
        except httptools.HttpParserError:
            status, message = self._refusal or (400, "this is not valid HTTP/1.1")
            self._refuse(status, message, "head" if self._refusal else "not_http")
            return
        if self._in_head and self._head_bytes:
            if self._head_bytes > self._options.max_head + self._options.max_request_line:
                self._refuse(431, "the headers are too large; send fewer or shorter ones", "head")
            elif self._head_timer is None:
                self._await_head()

    # --- parser -----------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer in plain HTTP whoever offers another protocol, as Java's client does by default.

        The parser takes the end of such a head for the end of the message. So another one reads the
        body, behind a head that says no more than how the body ends.
        """
        self.cycle.keep_alive = False
        if self.cycle.more_body:
            framing = [b"%s: %s\r\n" % each for each in self.headers if each[0] in _FRAMING]
            parser: Any = httptools.HttpRequestParser(_BodyOnly(self))
            self.parser = parser
            parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(framing))
            parser.feed_data(rest)

    def on_message_begin(self) -> None:
        """Let the application know its connection."""
        super().on_message_begin()
        self.scope["shipworthy.connection"] = self  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        """Take a piece of the address."""
        super().on_url(url)
        if len(self.url) > self._options.max_request_line:
            self._stop_parser(414, "the address is too long")

    def on_headers_complete(self) -> None:
        """Start the request, if its headers are within the limits."""
        self._stop_head_timer()
        if len(self.headers) > self._options.max_headers:
            self._stop_parser(431, f"there are more than {self._options.max_headers} headers")
        if sum(len(name) + len(value) + 4 for name, value in self.headers) > self._options.max_head:
            self._stop_parser(431, "the headers are too large; send fewer or shorter ones")
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()
        self.cycle.transport = self._outlet  # type: ignore[assignment]  # as much as is used of it

    def on_message_complete(self) -> None:
        """The next byte begins another head; but for a body that an upgrade has cut off."""
        if self.parser.should_upgrade() and any(name in _FRAMING for name, _ in self.headers):
            return
        self._in_head = True
        super().on_message_complete()

    def _stop_parser(self, status: int, message: str) -> None:
        self._refusal = status, message
        raise _RefusedHead

    @property
    def body_is_here(self) -> bool:
        """Whether the body of the request under way has arrived as a whole."""
        return self._running is not None and not self._running.more_body

    # --- requests ---------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._outlet.begin()
        task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        self._task = task
        self._running = cycle

    def on_response_complete(self) -> None:
        """Let go of the answer, then wait for the next request."""
        self._outlet.flush()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection; at once if its client does not even read the last answer."""
        if self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    # --- endings ----------------------------------------------------------------------------

    def close_gently(self) -> None:
        """Close; if the client is still sending, first let it read why it should stop.

        Closing with unread data resets the connection, and the client might never see the answer.
        """
        if self._in_head or self.transport.is_closing():
            self.transport.close()
            return
        self._lingered = 0
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Override: the protocol's own shape."""
        self._refuse(400, msg, "not_http")

    def _refuse(self, status: int, message: str, why: str) -> None:
        """Say no to the connection itself, and end it."""
        self.lost = True
        self._stop_head_timer()
        self._drop_request()
        self._metrics.bad_requests.labels(why).inc()
        if self.transport.is_closing():
            return
        body = error_body(message)
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        self.transport.write(
            b"%scontent-type: application/json\r\ncontent-length: %d\r\n"
            b"%sconnection: close\r\n\r\n%s" % (STATUS_LINE[status], len(body), retry, body)
        )
        self._in_head = False
        self.close_gently()

    def _drop_request(self) -> None:
        """Nobody will read the answer that is being made."""
        if self._running is not None:
            self._running.disconnected = True
        if self._task is not None and not self._task.done():
            self._task.cancel()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._options.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(408, "the headers did not arrive in time", "slow_head")
        else:
            self.transport.close()  # it never asked for anything

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _BodyOnly:
    """What a parser tells that reads the rest of a request whose head is known."""

    def __init__(self, connection: GatewayProtocol) -> None:
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete


class _Outlet:
    """A request's view of its transport.

    An answer's head waits for the first piece of its body, so that both go out in one system call;
    `close` is the connection's `close_gently`.
    """

    def __init__(self, connection: GatewayProtocol) -> None:
        self._connection = connection
        self._head: bytes | None = b""  # empty: expected; None: out

    def attach(self, transport: asyncio.Transport) -> None:
        """Pass everything else through."""
        self._send = transport.write
        self.is_closing = transport.is_closing

    def begin(self) -> None:
        """The next write is an answer's head."""
        self._head = b""

    def write(self, data: bytes) -> None:
        """Send, or keep for the next write what is an answer's head."""
        if self._head is None or data.startswith(b"HTTP/1.1 100 "):
            self._send(data)
        elif not self._head:
            self._head = data
        else:
            self._send(self._head + data)
            self._head = None

    def flush(self) -> None:
        """Send a head that has no body."""
        if self._head:
            self._send(self._head)
        self._head = None

    def close(self) -> None:
        """Send what is left, and end the connection."""
        self.flush()
        self._connection.close_gently()
