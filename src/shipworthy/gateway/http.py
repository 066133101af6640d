"""Requests as the doors see them, and answers as they give them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec

from shipworthy.protocols.outcomes import Reason

HeaderList = list[tuple[bytes, bytes]]

JSON: Final = b"application/json"
CLOSE: Final = (b"connection", b"close")
RETRY: Final = (b"retry-after", b"1")

_encode = msgspec.json.Encoder().encode

Shape = Callable[[int, str, str], bytes]
"""Makes an error's body in a protocol's own shape: of the status, the text for the client, and the
code of the limit that was met, if any."""


def plain_error(_status: int, message: str, _code: str = "") -> bytes:
    """The Open Inference Protocol's shape, which is also that of all that belongs to none."""
    return _encode({"error": message})


class Answer(msgspec.Struct, frozen=True):
    """What goes back: `headers` come on top of content type and length, and so do `lines`.

    Those are whole header lines, each with its end.
    """

    status: int
    body: bytes
    headers: HeaderList = []
    content_type: bytes = JSON
    lines: bytes = b""


class Refusal(Exception):
    """A request that is answered with an error. The message is for the client.

    `reason` is the outcome's code if the request is recorded, `code` that of a limit that was met.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: Reason = Reason.INVALID_INPUT,
        headers: HeaderList | None = None,
        code: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.code = code
        self.headers: HeaderList = headers or []

    def answer(self, shape: Shape = plain_error) -> Answer:
        """The error in the protocol's shape."""
        return Answer(self.status, shape(self.status, str(self), self.code), self.headers)


class ClientGone(Exception):
    """The client closed the connection before it had sent the whole request."""


class BodyMemory:
    """How many bytes of bodies this worker holds at once."""

    def __init__(self, limit: int) -> None:
        self.held = 0
        self._limit = limit

    def take(self, size: int) -> None:
        """Count bytes in; 503 when there is no room."""
        if self.held + size > self._limit:
            raise Refusal(
                503,
                "the gateway holds as many request bodies as it may; try again in a moment",
                reason=Reason.FULL_GATEWAY,
                headers=[RETRY],
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """Count bytes out."""
        self.held -= size


class Client(Protocol):
    """A client's connection, as whoever streams an answer to it sees it.

    `lost` says that it is closed, `paused` that the client reads more slowly than it is written to.
    """

    lost: bool
    paused: bool

    def begin_stream(self, request: Request, lines: bytes, content_type: bytes) -> None:
        """Begin an answer in pieces; its head goes out with the first of them."""
        ...

    def send(self, piece: bytes) -> None:
        """Send a piece of it."""
        ...

    async def drained(self, seconds: float) -> None:
        """Wait until the client has read what it was sent; ClientGone when it does not."""
        ...

    def end_stream(self, last: bytes = b"") -> None:
        """Send the last piece, and say that it is the last."""
        ...


class Request:
    """One request. Names of headers are lower case; of repeated ones the last counts.

    `body` is all of it, unless there is a `problem`: then the request can't be read, for that
    reason, and whoever handles it raises that. `shape` is that of its errors.
    """

    __slots__ = (
        "answer", "body", "connection", "handler", "headers", "keep_alive", "limit", "method",
        "path", "problem", "shape", "wants_close",
    )  # fmt: skip

    def __init__(self, connection: Client) -> None:
        self.connection = connection
        self.method = ""
        self.path = ""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.answer: Answer | None = None  # where none needs to be made
        self.handler: Handler | None = None
        self.limit = 0
        self.keep_alive = True
        self.wants_close = False
        self.problem: Refusal | ClientGone | None = None
        self.shape: Shape = plain_error

    def gone(self) -> bool:
        """Whether the client is known to have closed the connection."""
        return self.connection.lost

    def text(self, name: bytes, *, at_most: int) -> str | None:
        """A header as text, None when absent or empty; 400 when it is longer than allowed.

        Headers have no declared encoding: UTF-8 if it is, else Latin-1, which always is.
        """
        raw = self.headers.get(name)
        if not raw:
            return None
        if len(raw) > at_most:
            raise Refusal(400, f"the header {name.decode()} is longer than {at_most} bytes")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode("latin-1")


Handler = Callable[[Request], Awaitable[Answer | None]]
"""Answers a request whose body is there; None when the answer has been sent already."""
