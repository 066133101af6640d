"""A client's connection: HTTP/1.1 with limits, so that a client can hold it, some memory, no more.

Written on httptools' parser itself: a server with an application interface between them costs as
much per request as all that the gateway does with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from http import HTTPStatus
from typing import Any, Final, Protocol
from urllib.parse import unquote

import httptools

from shipworthy.gateway.http import (
    RETRY,
    Answer,
    BodyMemory,
    ClientGone,
    Handler,
    Refusal,
    Request,
    plain_error,
)
from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.options import GatewayOptions
from shipworthy.protocols.outcomes import Reason

_LINGER_SECONDS: Final = 1.0
_LINGER_BYTES: Final = 4 * 1024 * 1024
_MAX_LINE: Final = 16  # requests sent ahead, beyond which no more is read for now
_SMALL_BODY: Final = 100_000  # read and thrown away where a door takes none
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})
_JOINED: Final = frozenset({b"traceparent", b"tracestate"})  # of others the last one counts
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}


_NOTHING: Final = Answer(500, plain_error(500, "the gateway has no answer; it is a fault of ours"))


class Application(Protocol):
    """What answers; see `shipworthy.gateway.application`."""

    def open(self, request: Request) -> Answer | Handler:
        """Decide by the head alone: an answer, or who makes one when the body is there.

        For a handler, `request.limit` is then the most that the body may have.
        """
        ...

    def failed(self, fault: Exception) -> Answer:
        """What a client gets when a handler raises."""
        ...


class Connections:
    """What the connections of one worker share.

    `date` is the current Date header, renewed by the worker each second.
    """

    def __init__(
        self,
        application: Application,
        options: GatewayOptions,
        metrics: Metrics,
        memory: BodyMemory,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.application = application
        self.options = options
        self.metrics = metrics
        self.memory = memory
        self.loop = loop
        self.open: set[ClientConnection] = set()
        self.arriving: set[asyncio.Task[None]] = set()  # accepted, and not open yet
        self.tasks: set[asyncio.Task[None]] = set()
        self.date = b""
        self.draining = False


class _RefusedHead(Exception):
    """Raised in a callback to stop the parser; the refusal is in the connection."""


class ClientConnection(asyncio.Protocol):
    """One client connection.

    `lost` says that it is closed. Its current request's task is cancelled when that happens before
    the answer is out, so that no upstream works for nobody. `paused` says that the client reads
    more slowly than it is written to. One that is `kept` was another worker's before.
    """

    def __init__(self, shared: Connections, *, kept: bool = False) -> None:
        self.lost = False
        self.paused = False
        self._kept = kept
        self._shared = shared
        self._options = shared.options
        self._loop = shared.loop
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # from the first event
        self._receiving: Request | None = None  # whose head or body is being read
        self._answering: Request | None = None  # whose task is under way
        self._line: deque[Request] = deque()  # sent before the one in front is answered
        self._task: asyncio.Task[None] | None = None
        self._url = b""
        self._in_head = True
        self._head_bytes = 0  # received since the last message's end, body aside
        self._header_bytes = self._headers = 0
        self._parts: list[bytes] = []
        self._body_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._reading: asyncio.TimerHandle | None = None  # until a head or body must be there
        self._idle: asyncio.TimerHandle | None = None
        self._idle_since = 0.0
        self._lingered: int | None = None
        self._streaming = False
        self._head: bytes | None = None  # of a stream, waiting for its first piece
        self._chunked = False
        self._writable: asyncio.Future[None] | None = None

    # --- connection -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many already; the client has to say what it wants soon."""
        self._transport = transport
        shared = self._shared
        shared.open.add(self)
        limit = self._options.max_connections
        if len(shared.open) > 2 * limit:
            transport.abort()
        elif len(shared.open) > limit:
            self._refuse(503, "the gateway has as many connections as it may", "too_many")
        elif self._kept:
            self._rest()
        else:
            self._read_within(self._options.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # its signature
        """Stop the work that was being done for it."""
        self.lost = True
        self._shared.open.discard(self)
        self._stop_reading()
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._drop_requests()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, watching how much of a head there is without its end."""
        if self._lingered is not None:
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self._transport.abort()
            return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            status, message = self._refusal or (400, "this is not valid HTTP/1.1")
            self._refuse(status, message, "head" if self._refusal else "not_http")
            return
        if self._in_head:
            if self._head_bytes:
                self._watch_head()
        elif self._reading is None and self._receiving is not None:
            self._read_within(self._options.body_seconds)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self.paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self._answering is None and not self.lost and self._lingered is None:
            self._go_on()

    def _watch_head(self) -> None:
        if self._head_bytes > self._options.max_head + self._options.max_request_line:
            self._refuse(431, "the headers are too large; send fewer or shorter ones", "head")
        elif self._reading is None:
            self._read_within(self._options.head_seconds)

    def _read_within(self, seconds: float) -> None:
        self._reading = self._loop.call_later(seconds, self._is_late)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _is_late(self) -> None:
        self._reading = None
        if len(self._line) >= _MAX_LINE or (self._in_head and self._answering is not None):
            # It is we who don't read on, or there is an answer to be had first.
            self._read_within(self._options.head_seconds)
        elif not self._in_head:
            text = f"the body did not arrive within {self._options.body_seconds:g} seconds"
            self._spoil(self._receiving, Refusal(408, text, reason=Reason.BODY_TIMEOUT))
        elif self._head_bytes:
            self._refuse(408, "the headers did not arrive in time", "slow_head")
        else:
            self._transport.close()  # it never asked for anything

    # --- parser -----------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request; of one behind the last answer nothing is done."""
        if self._lingered is not None or self._transport.is_closing():
            raise _RefusedHead
        self._receiving = Request(self)
        self._url = b""
        self._header_bytes = self._headers = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the address."""
        self._url += url
        if len(self._url) > self._options.max_request_line:
            self._stop_parser(414, "the address is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        headers = self._receiving.headers  # type: ignore[union-attr]  # a message has begun
        self._headers += 1
        self._header_bytes += len(name) + len(value) + 4
        name = name.lower()
        if name in _JOINED and name in headers:
            value = headers[name] + b"," + value
        headers[name] = value
        if self._header_bytes > self._options.max_head:
            self._stop_parser(431, "the headers are too large; send fewer or shorter ones")
        if self._headers > self._options.max_headers:
            self._stop_parser(431, f"there are more than {self._options.max_headers} headers")

    def on_headers_complete(self) -> None:
        """Decide about the request, or let it wait for its turn."""
        request = self._receiving
        assert request is not None  # noqa: S101  # a message has begun
        parser, headers = self._parser, request.headers
        request.method = parser.get_method().decode("ascii")
        request.keep_alive = parser.should_keep_alive()
        if b"connection" in headers and (
            parser.get_http_version() == "1.0" or parser.should_upgrade()
        ):
            request.keep_alive = False
        request.path = self._path()
        self._in_head = False
        self._head_bytes = 0
        self._parts = []
        self._body_bytes = 0
        self._stop_reading()
        if self._answering is None and not self._line and not self.paused:
            self._open(request)

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; of a request that is not open yet, within the same bounds."""
        request = self._receiving
        if request is None or request.problem is not None:
            return
        self._body_bytes += len(body)
        if request.answer is not None:
            if self._body_bytes > _SMALL_BODY:
                self._answer_unread(request)
            return
        try:
            if self._body_bytes > (request.limit or self._options.max_body):
                raise _too_large(request.limit or self._options.max_body)
            self._shared.memory.take(len(body))
        except Refusal as refusal:
            self._spoil(request, refusal)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """Answer, or wait for one's turn; but for a body that an upgrade has cut off."""
        if self._parser.should_upgrade() and any(
            name in _FRAMING
            for name in self._receiving.headers  # type: ignore[union-attr]
        ):
            return
        self.complete()

    def complete(self) -> None:
        """The request is here."""
        request, self._receiving = self._receiving, None
        self._in_head = True
        self._stop_reading()
        if request is None or request.problem is not None:
            return
        parts, self._parts = self._parts, []
        request.body = parts[0] if len(parts) == 1 else b"".join(parts)
        if request is self._answering:
            self._start(request)
        else:
            self._line.append(request)
            if len(self._line) == _MAX_LINE:  # as long as we read we notice that it leaves
                self._transport.pause_reading()

    def _path(self) -> str:
        """The address without its query."""
        url = self._url
        if not url.startswith(b"/") or not url.isascii():
            try:
                url = httptools.parse_url(url).path
            except httptools.HttpParserInvalidURLError:
                url = b""
            if not url:
                self._stop_parser(400, "this is not valid HTTP/1.1")
        path = url.partition(b"?")[0].decode("ascii")
        return unquote(path) if "%" in path else path

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer in plain HTTP whoever offers another protocol, as Java's client does by default.

        The parser takes the end of such a head for the end of the message. So another one reads the
        body, behind a head that says no more than how the body ends.
        """
        request = self._receiving or self._answering
        if request is None:
            return
        request.keep_alive = False
        if self._receiving is not None:
            framing = [b"%s: %s\r\n" % (n, v) for n, v in request.headers.items() if n in _FRAMING]
            parser: Any = httptools.HttpRequestParser(_BodyOnly(self))
            self._parser = parser
            parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(framing))
            parser.feed_data(rest)

    def _stop_parser(self, status: int, message: str) -> None:
        self._refusal = status, message
        raise _RefusedHead

    # --- requests ---------------------------------------------------------------------------

    def _open(self, request: Request) -> None:
        """Let the application decide by the head whether the body is wanted."""
        self._answering = request
        try:
            opened = self._shared.application.open(request)
        except Exception as fault:  # noqa: BLE001  # the parser would take it for the client's
            opened = self._shared.application.failed(fault)
        if isinstance(opened, Answer):
            request.answer = opened
            if self._receiving is request and _is_long(request):
                self._answer_unread(request)
            return
        request.handler = opened
        problem = _problem(request)
        if problem is not None:
            self._spoil(request, problem)
        elif request.headers.get(b"expect", b"").lower() == b"100-continue":
            self._transport.write(_CONTINUE)

    def _answer_unread(self, request: Request) -> None:
        """Answer a request whose body nobody wants to see the end of, and end the connection."""
        request.problem = ClientGone()  # no more of the body is taken
        request.wants_close = True
        self._start(request)

    def _spoil(self, request: Request | None, problem: Refusal | ClientGone) -> None:
        """The body can't be had: whoever handles the request says so, and the connection ends."""
        if request is None or request.problem is not None:
            return
        request.problem = problem
        request.wants_close = True
        if request is self._receiving:
            self._stop_reading()
            self._shared.memory.give_back(sum(map(len, self._parts)))
            self._parts = []
        else:
            self._shared.memory.give_back(len(request.body))
            request.body = b""
            return  # it waits for its turn, or has it
        if request is not self._answering:
            self._line.append(request)
        else:
            self._start(request)

    def _start(self, request: Request) -> None:
        """Have the request answered, unless it was by its head; in a task where that takes one."""
        if request is not self._answering:
            return
        handler = request.handler
        if handler is None:
            self._respond(request, request.answer or _NOTHING)
            return
        task = self._loop.create_task(self._run(request, handler))
        self._task = task
        self._shared.tasks.add(task)

    async def _run(self, request: Request, handler: Handler) -> None:
        """See a handler to its end, whatever that is."""
        answer: Answer | None = None
        try:
            answer = await handler(request)
        except ClientGone:
            request.wants_close = True
        except asyncio.CancelledError:
            request.wants_close = True
            if not self.lost and not self._streaming:
                answer = Refusal(503, "the gateway is ending; ask again", headers=[RETRY]).answer(
                    request.shape
                )
        except Exception as fault:  # noqa: BLE001  # the client gets an answer, whatever it is
            request.wants_close = True
            answer = self._shared.application.failed(fault)
        self._shared.tasks.discard(self._task)  # type: ignore[arg-type]  # it is this task
        self._task = None
        self._shared.memory.give_back(len(request.body))
        if answer is not None and not self._streaming:
            self._respond(request, answer)
        else:
            self._streaming = False
            self._next(request)

    def _next(self, request: Request) -> None:
        """An answer is out: end the connection, or go on with what the client sent meanwhile."""
        self._answering = None
        if request.wants_close or not request.keep_alive or self.lost:
            self._drop_line()
            self.close_gently()
            return
        self._rest()
        if not self.paused:  # else when it has read what it got
            self._go_on()

    def _go_on(self) -> None:
        """Turn to what the client has sent meanwhile, if it has."""
        if self._line:
            self._loop.call_soon(self._serve_line)
            return
        self._transport.resume_reading()
        if self._receiving is not None and not self._in_head:  # it has sent half a request
            self._open(self._receiving)

    def _rest(self) -> None:
        """Wait for the client's next request."""
        self._idle_since = self._loop.time()
        if self._idle is None:
            self._idle = self._loop.call_later(self._options.keep_alive_seconds, self._is_idle)

    def _serve_line(self) -> None:
        """Take the next of the requests that were sent before the one in front was answered."""
        if self.lost or self.paused or self._answering is not None or not self._line:
            return
        request = self._line.popleft()
        self._open(request)
        self._start(request)

    def _drop_line(self) -> None:
        for waiting in self._line:
            self._shared.memory.give_back(len(waiting.body))
        self._line.clear()

    def _is_idle(self) -> None:
        """End an idle connection; at once if its client does not even read the last answer."""
        self._idle = None
        if self._transport.is_closing():
            return
        left = self._idle_since + self._options.keep_alive_seconds - self._loop.time()
        receiving = self._receiving is not None and not self.paused
        if self._answering is not None or receiving or left > 0.001:
            wait = left if left > 0.001 else self._options.keep_alive_seconds
            self._idle = self._loop.call_later(wait, self._is_idle)
        elif self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    # --- answers ----------------------------------------------------------------------------

    def _respond(self, request: Request, answer: Answer) -> None:
        if self.lost or self._transport.is_closing():
            self._answering = None
            return
        body = answer.body
        head = [
            _STATUS_LINES.get(answer.status) or b"HTTP/1.1 %d \r\n" % answer.status,
            self._shared.date,
            b"content-type: %s\r\ncontent-length: %d\r\n" % (answer.content_type, len(body)),
            answer.lines,
        ]
        if answer.headers:
            head.extend([b"%s: %s\r\n" % header for header in answer.headers])
        request.wants_close = self._closes(request)
        head.append(b"connection: close\r\n\r\n" if request.wants_close else b"\r\n")
        if request.method != "HEAD":
            head.append(body)
        self._transport.write(b"".join(head))
        self._next(request)

    def begin_stream(self, request: Request, lines: bytes, content_type: bytes) -> None:
        """Begin an answer in pieces; its head goes out with the first of them."""
        self._streaming = True
        self._chunked = request.keep_alive or self._parser.get_http_version() != "1.0"
        head = [_STATUS_LINES[200], self._shared.date]
        head += [b"content-type: %s\r\n" % content_type, lines]
        if self._closes(request):
            request.wants_close = True
            head.append(b"connection: close\r\n")
        head.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._head = b"".join(head)

    def send(self, piece: bytes) -> None:
        """Send a piece of an answer that was begun; see `paused` and `drained`."""
        if self.lost or not piece:
            return
        if self._chunked:
            piece = b"%x\r\n%s\r\n" % (len(piece), piece)
        if self._head is not None:
            piece, self._head = self._head + piece, None
        self._transport.write(piece)

    async def drained(self, seconds: float) -> None:
        """Wait until the client has read what it was sent; ClientGone when it does not."""
        if self.paused and not self.lost:
            self._writable = self._loop.create_future()
            try:
                async with asyncio.timeout(seconds):
                    await self._writable
            except TimeoutError:
                self._transport.abort()
                self.lost = True
            finally:
                self._writable = None
        if self.lost:
            raise ClientGone

    def end_stream(self, last: bytes = b"") -> None:
        """Send the last piece, and say that it is the last."""
        if self.lost:
            return
        if self._chunked:
            last = (b"%x\r\n%s\r\n" % (len(last), last) if last else b"") + b"0\r\n\r\n"
        head, self._head = self._head or b"", None
        self._transport.write(head + last)

    def _closes(self, request: Request) -> bool:
        """Whether the connection ends behind an answer that begins now, which has to say so."""
        return request.wants_close or not request.keep_alive or self._shared.draining

    # --- endings ----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has been read, and no answer is under way."""
        return not (self._answering or self._receiving or self._line or self._head_bytes)

    def shutdown(self, rested: float) -> None:
        """End if idle for so many seconds; sooner, the client may just be sending a request."""
        if self.idle and self._loop.time() >= self._idle_since + rested:
            self._transport.close()

    def detach(self) -> int | None:
        """The socket of an idle connection as a descriptor of its own, which outlives this one.

        What its client sends meanwhile waits there. None for what can't be taken out: TLS, and
        answers that the client has not read.
        """
        transport = self._transport
        written = not transport.get_write_buffer_size() and not transport.is_closing()
        secure = transport.get_extra_info("sslcontext") is not None
        if secure or not written or not self.idle or self._lingered is not None:
            return None
        return os.dup(transport.get_extra_info("socket").fileno())

    def end(self) -> None:
        """Close, once what was written is out."""
        self._transport.close()

    def close_gently(self) -> None:
        """Close; if the client is still sending, first let it read why it should stop.

        Closing with unread data resets the connection, and the client might never see the answer.
        """
        if self._in_head or self._transport.is_closing():
            self._transport.close()
            return
        self._lingered = 0
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            self._transport.write_eof()
        self._transport.resume_reading()
        self._loop.call_later(_LINGER_SECONDS, self._transport.abort)

    def _refuse(self, status: int, message: str, why: str) -> None:
        """Say no to the connection itself, and end it."""
        self._stop_reading()
        if self._lingered is not None:
            return  # it has its answer already
        self._drop_requests()
        self._shared.metrics.bad_requests.labels(why).inc()
        if self._transport.is_closing():
            return
        if not self._streaming:  # amid an answer there is no place for another
            body = plain_error(status, message)
            retry = b"retry-after: 1\r\n" if status == 503 else b""
            self._transport.write(
                b"%scontent-type: application/json\r\ncontent-length: %d\r\n"
                b"%sconnection: close\r\n\r\n%s" % (_STATUS_LINES[status], len(body), retry, body)
            )
        self._in_head = False
        self.close_gently()

    def _drop_requests(self) -> None:
        """Nobody will read the answers that are being made."""
        self.lost = True
        self._drop_line()
        if self._task is not None:
            self._loop.call_soon(self._task.cancel)  # it has to have begun to be able to end well
        elif self._answering is not None and self._answering.handler is not None:
            self._spoil(self._receiving, ClientGone())
        if self._parts and self._receiving is not None:
            self._shared.memory.give_back(sum(map(len, self._parts)))
            self._parts = []


class _BodyOnly:
    """What a parser tells that reads the rest of a request whose head is known."""

    def __init__(self, connection: ClientConnection) -> None:
        self.on_body = connection.on_body
        self.on_message_complete = connection.complete


def _is_long(request: Request) -> bool:
    """Whether a body is too long to be read for nothing, for all we know."""
    headers = request.headers
    unknown = b"transfer-encoding" in headers or b"expect" in headers
    return unknown or len(headers.get(b"content-length", b"0")) > 5


def _problem(request: Request) -> Refusal | None:
    """Why the body that is announced, or here, is not wanted."""
    headers = request.headers
    if headers.get(b"content-encoding", b"identity") != b"identity":
        return Refusal(
            415,
            "compressed bodies are not accepted; send it as it is",
            reason=Reason.UNSUPPORTED,
        )
    announced = headers.get(b"content-length", b"0")
    if len(announced) > 15 or int(announced) > request.limit or len(request.body) > request.limit:
        return _too_large(request.limit)
    return None


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        f"the body is larger than {limit} bytes; send smaller batches",
        reason=Reason.TOO_LARGE,
    )
