"""Requests as the doors see them, and answers as they give them: a thin layer over ASGI."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import msgspec

from shipworthy.protocols.oip import error_body
from shipworthy.protocols.outcomes import Reason

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

JSON: Final = (b"content-type", b"application/json")
CLOSE: Final = (b"connection", b"close")
RETRY: Final = (b"retry-after", b"1")

_LENGTH = re.compile(rb"[0-9]{1,15}")


class Answer(msgspec.Struct, frozen=True):
    """What goes back: `headers` come on top of content type and length."""

    status: int
    body: bytes
    headers: HeaderList = []
    content_type: bytes = JSON[1]


class Refusal(Exception):
    """A request that is answered with an error. The message is for the client.

    `reason` is the outcome's code if the request is recorded.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: Reason = Reason.INVALID_INPUT,
        headers: HeaderList | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.headers: HeaderList = headers or []

    def answer(self) -> Answer:
        """The error in the protocol's shape."""
        return Answer(self.status, error_body(str(self)), self.headers)


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


class Request:
    """One request. Names of headers are lower case; of repeated ones the last counts."""

    __slots__ = ("_begun", "_receive", "_unread", "headers", "method", "path", "scope")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._unread = True
        self._begun = False

    def gone(self) -> bool:
        """Whether the client is known to have closed the connection."""
        connection = self.scope.get("shipworthy.connection")
        return connection is not None and connection.lost

    def leaves_body(self) -> bool:
        """Whether there is a body, not read, too long to be read for nothing."""
        if not self._unread:
            return False
        headers = self.headers
        unknown = b"transfer-encoding" in headers or b"expect" in headers
        return self._begun or unknown or len(headers.get(b"content-length", b"0")) > 5

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

    async def body(self, limit: int, seconds: float, memory: BodyMemory) -> bytes:
        """The whole body; its size is counted in `memory` for the caller to give back.

        Raises Refusal: 413 beyond `limit` bytes, announced or not, without reading on; 408 when it
        is not there after `seconds`; 415 when it is compressed.
        """
        if self.headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refusal(
                415,
                "compressed bodies are not accepted; send it as it is",
                reason=Reason.UNSUPPORTED,
            )
        announced = self.headers.get(b"content-length")
        if announced and (not _LENGTH.fullmatch(announced) or int(announced) > limit):
            raise _too_large(limit)
        parts: list[bytes] = []
        connection = self.scope.get("shipworthy.connection")
        try:
            if connection is not None and connection.body_is_here:
                await self._collect(parts, limit, memory)
            else:
                async with asyncio.timeout(seconds):
                    await self._collect(parts, limit, memory)
        except TimeoutError:
            memory.give_back(sum(map(len, parts)))
            raise Refusal(
                408,
                f"the body did not arrive within {seconds:g} seconds",
                reason=Reason.BODY_TIMEOUT,
            ) from None
        except BaseException:
            memory.give_back(sum(map(len, parts)))
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _collect(self, parts: list[bytes], limit: int, memory: BodyMemory) -> None:
        self._begun = True
        size = 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            memory.take(len(part))
            parts.append(part)
            more = message.get("more_body", False)
        self._unread = False


class ClientGone(Exception):
    """The client closed the connection before it had sent the whole request."""


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        f"the body is larger than {limit} bytes; send smaller batches",
        reason=Reason.TOO_LARGE,
    )


async def send_answer(send: Send, answer: Answer, *, close: bool = False) -> None:
    """Write an answer out, and with `close` end the connection after it."""
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", b"%d" % len(answer.body)),
        *answer.headers,
    ]
    if close:
        headers.append(CLOSE)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
