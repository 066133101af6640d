"""Streamed chat completions as a client sees them: when the first word comes, how many at once."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httptools
import msgspec
import uvloop
from peers import Service
from upstreams import HOLD, Unusable
from wrk import UNIT_HEADER

_CONTENT = re.compile(rb'"content":\s*"[^"]')
_PATIENCE = 20.0
_AT_ONCE = 50  # streams that are being opened


def post(service: Service, body: bytes, **headers: str) -> bytes:
    """A chat request to a service, as it goes over the wire."""
    lines = [f"POST {service.path} HTTP/1.1", f"Host: 127.0.0.1:{service.port}"]
    given = {"Content-Type": "application/json", **service.headers, **headers}
    lines += [f"{name}: {value}" for name, value in given.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def first_words(services: Sequence[Service], turns: int) -> dict[str, list[float]]:
    """Seconds to the first content of `turns` streams of each service, all taking turns."""
    return uvloop.run(_first_words(services, turns))


def held(service: Service, count: int) -> tuple[float, float]:
    """Resident MB of a service before and while `count` streams idle after their first word."""
    return uvloop.run(_held(service, count))


def _question(service: Service, **more: str) -> bytes:
    message = {"role": "user", "content": "How long is the warranty of the blue kettle?"}
    return msgspec.json.encode(
        {"model": service.model, "messages": [message], "stream": True, **more}
    )


class _Stream(asyncio.Protocol):
    """One connection with one stream at a time."""

    def __init__(self) -> None:
        self.began = self.first = 0.0
        self.spoken = asyncio.Event()
        self.ended = asyncio.Event()
        self.problem: str | None = None
        self.said = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpResponseParser(self)

    def ask(self, request: bytes) -> None:
        self.spoken.clear()
        self.ended.clear()
        self.said = b""
        self.began, self.first = time.perf_counter(), 0.0
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.parser.feed_data(data)
        if not self.first and _CONTENT.search(self.said):
            self.first = now - self.began
            self.spoken.set()

    def on_body(self, body: bytes) -> None:
        self.said += body

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() != 200 or not _CONTENT.search(self.said):
            self.problem = f"{self.parser.get_status_code()} {self.said[:200]!r}"
        self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.is_set():
            self.problem = f"connection lost: {exc!r}"
        self.spoken.set()
        self.ended.set()


async def _connect(service: Service) -> _Stream:
    loop = asyncio.get_running_loop()
    try:
        return (await loop.create_connection(_Stream, "127.0.0.1", service.port))[1]
    except OSError as error:
        raise Unusable(f"{service.name} takes no connection: {error}") from error


async def _one(service: Service, stream: _Stream, request: bytes) -> float:
    stream.ask(request)
    with suppress(TimeoutError):
        await asyncio.wait_for(stream.ended.wait(), _PATIENCE)
    if stream.problem or not stream.first:
        raise Unusable(f"{service.name} does not stream: {stream.problem or 'nothing came'}")
    return stream.first


async def _first_words(services: Sequence[Service], turns: int) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {service.name: [] for service in services}
    asking = [(one, await _connect(one), post(one, _question(one))) for one in services]
    for turn in range(-5, turns):
        for service, stream, request in asking:
            if stream.transport.is_closing():
                raise Unusable(f"{service.name} closed its connection")
            seconds = await _one(service, stream, request)
            if turn >= 0:
                took[service.name].append(seconds)
    for _, stream, _ in asking:
        stream.transport.close()
    return took


async def _held(service: Service, count: int) -> tuple[float, float]:
    before = service.rss_mb()
    streams: list[_Stream] = []
    places = asyncio.Semaphore(_AT_ONCE)

    async def begin(number: int) -> None:
        async with places:
            stream = await _connect(service)
            streams.append(stream)
            unit = {UNIT_HEADER: f"user-{number}"}
            stream.ask(post(service, _question(service, user=HOLD), **unit))
            await asyncio.wait_for(stream.spoken.wait(), _PATIENCE)
            if stream.problem or stream.ended.is_set():
                raise Unusable(stream.problem or "the stream ended")

    try:
        await asyncio.gather(*(begin(number) for number in range(count)))
        await asyncio.sleep(1.0)
        broken = [stream.problem for stream in streams if stream.problem]
        if broken:
            raise Unusable(f"{len(broken)} of {count} streams broke: {broken[0]}")
        return before, service.rss_mb()
    except (OSError, TimeoutError) as error:
        spoken = sum(bool(stream.first) for stream in streams)
        raise Unusable(f"{spoken} of {count} streams began: {error!r}") from error
    finally:
        for stream in streams:
            stream.transport.close()
        await asyncio.sleep(0.2)
