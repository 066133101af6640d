"""The clients of `bench/churn.py`: they write down all that became of each request that they sent.

They behave as HTTP clients do that never send a request twice: a connection is used again unless
its server said or showed that it ends, and what breaks behind a request's first byte is dropped.
Most connections are busy, some rest for seconds between two requests, and some requests come on a
connection of their own.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import random
import re
import time
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httptools
import msgspec
import uvloop
from upstreams import Unusable

_TICK = 0.001
_PATIENCE = 30.0
_CLOSED_LOOP = 24  # connections of the closed loop that finds the capacity
_MOST = 200  # busy connections
_RESTING = 100
_TO_RESTING, _TO_NEW = 0.05, 0.10  # the shares of requests
_CONTENT = re.compile(rb'"content":"([^"]*)"')

Kind = str
"""`infer`, `chat` or `stream`."""


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: models with the kinds of requests that they take, and keys by their names.

    `counted` is a key that has a limit, and asks `counted_rate` times a second beside the rest.
    """

    port: int
    models: dict[str, tuple[Kind, ...]]
    keys: dict[str, str]
    counted: str = ""
    counted_rate: float = 0.0
    units: int = 500
    seed: int = 2026


class Asked(msgspec.Struct, array_like=True):
    """A request and what became of it; times are of the monotonic clock, which all processes share.

    `status` is 0 where no whole answer came: `fault` then says how that showed. `said` is what the
    server said in it: the release's version, the server's place, and the request's number.
    """

    number: int
    model: str
    kind: Kind
    key: str
    unit: str | None
    due: float
    way: str = ""
    began: float = 0.0
    ended: float = 0.0
    status: int = 0
    inference: str = ""
    release: str = ""
    said: tuple[int, int, int] = (0, 0, 0)
    fault: str = ""


class Load:
    """A crowd at work in a process of its own.

    `capacity` asks as fast as answers come, `begin` at a rate until `end`, which gives all that was
    asked since.
    """

    def __init__(self, traffic: Traffic, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._file = folder / "asked"
        self._process = context.Process(target=_run, args=(there, traffic, self._file), daemon=True)
        self._process.start()
        there.close()

    def capacity(self, seconds: float) -> float:
        """Requests a second in a closed loop."""
        self._pipe.send(("capacity", seconds))
        return self._told()

    def begin(self, rate: float) -> None:
        """Ask so many times a second from now on."""
        self._pipe.send(("begin", rate))
        self._told()

    def end(self) -> list[Asked]:
        """Ask no more, wait for all answers, and tell."""
        self._pipe.send(("end", 0.0))
        self._told()
        return msgspec.msgpack.decode(self._file.read_bytes(), type=list[Asked])

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()

    def _told(self) -> float:
        try:
            return self._pipe.recv()
        except EOFError:
            raise Unusable("the crowd's process broke") from None


def _run(pipe: Connection, traffic: Traffic, file: Path) -> None:
    uvloop.run(_obey(pipe, traffic, file))


async def _obey(pipe: Connection, traffic: Traffic, file: Path) -> None:
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)  # a pause of ours would show as the server's
    crowd = _Crowd(traffic)
    while True:
        what, number = await asyncio.to_thread(pipe.recv)
        told = 0.0
        if what == "capacity":
            told = await crowd.capacity(number)
        elif what == "begin":
            await crowd.begin(number)
        else:
            content = msgspec.msgpack.encode(await crowd.end())
            await asyncio.to_thread(file.write_bytes, content)
        pipe.send(told)


class _Crowd:
    """All clients."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.rng = random.Random(traffic.seed)
        self.loop = asyncio.get_running_loop()
        self.mix = [(name, kind) for name, kinds in traffic.models.items() for kind in kinds]
        self.keys = [name for name in traffic.keys if name != traffic.counted]
        self.numbers = 0
        self.asked: list[Asked] = []
        self.open = 0  # requests under way or due
        self.free: deque[_Client] = deque()
        self.resting: deque[_Client] = deque()
        self.waiting: deque[Asked] = deque()
        self.busy = 0  # connections for the waiting, open or being opened
        self.tasks: set[asyncio.Task[None]] = set()
        self.closed_loop = False
        self.rate = 0.0
        self.done = asyncio.Event()

    async def capacity(self, seconds: float) -> float:
        """Ask again with each answer."""
        self.closed_loop = True
        for _ in range(_CLOSED_LOOP):
            self.submit(self.make(self.clock()))
        await asyncio.sleep(seconds / 4)
        before, began = len(self.asked), self.clock()
        await asyncio.sleep(seconds * 3 / 4)
        answered, took = len(self.asked) - before, self.clock() - began
        self.closed_loop = False
        await self.all_answered()
        broken = [one for one in self.asked if one.status not in (200, 401)]
        if broken:
            raise Unusable(f"it breaks before anything happens: {broken[0]}")
        self.asked = []
        return answered / took

    async def begin(self, rate: float) -> None:
        """Ask at a rate from now on."""
        while len(self.resting) < _RESTING:
            self.resting.append(_Client(self, "resting"))
            await self.resting[-1].connect()
        self.rate, self.from_ = rate, self.clock()
        self.sent = self.counted = 0
        self.loop.call_soon(self.tick)

    def tick(self) -> None:
        """Send what is due."""
        if not self.rate:
            return
        passed = self.clock() - self.from_
        while self.sent < passed * self.rate:
            self.submit(self.make(self.from_ + self.sent / self.rate))
            self.sent += 1
        while self.counted < passed * self.traffic.counted_rate:
            one = self.make(self.clock())
            one.key = self.traffic.counted
            self.submit(one)
            self.counted += 1
        self.loop.call_later(_TICK, self.tick)

    async def end(self) -> list[Asked]:
        """Ask no more."""
        self.rate = 0.0
        await self.all_answered()
        asked, self.asked = self.asked, []
        return asked

    async def all_answered(self) -> None:
        self.done.clear()
        if self.open:
            await asyncio.wait_for(self.done.wait(), 2 * _PATIENCE)

    def make(self, due: float) -> Asked:
        """Think of a request; one in four says nothing of its unit."""
        rng, self.numbers = self.rng, self.numbers + 1
        model, kind = rng.choice(self.mix)
        unit = f"user-{rng.randrange(self.traffic.units)}" if rng.random() < 0.75 else None
        return Asked(self.numbers, model, kind, rng.choice(self.keys), unit, due)

    def submit(self, one: Asked) -> None:
        """Send a request as soon as there is a connection for it."""
        self.open += 1
        draw = self.rng.random()
        if draw < _TO_NEW:
            self.spawn(_Client(self, "new").begin(one))
        elif draw < _TO_NEW + _TO_RESTING and self.resting:
            resting = self.resting.popleft()
            if resting.usable:
                resting.ask(one)
            else:
                self.spawn(resting.begin(one))
        else:
            self.send(one)

    def send(self, one: Asked) -> None:
        while self.free:
            client = self.free.pop()
            if client.usable:
                client.ask(one)
                return
            self.busy -= 1
        if self.busy < _MOST:
            self.busy += 1
            self.spawn(_Client(self, "kept").begin(one))
        else:
            self.waiting.append(one)

    def spawn(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def answered(self, client: _Client, one: Asked) -> None:
        """A request is over, however; its client may take another one."""
        one.ended = self.clock()
        self.asked.append(one)
        self.open -= 1
        if client.way == "resting":
            self.resting.append(client)
        elif client.way == "kept":
            self.next(client)
        if self.closed_loop:
            self.submit(self.make(one.ended))
        elif not self.open:
            self.done.set()

    def next(self, client: _Client) -> None:
        if not client.usable:
            self.busy -= 1
            if self.waiting:
                self.send(self.waiting.popleft())
        elif self.waiting:
            client.ask(self.waiting.popleft())
        else:
            self.free.append(client)

    clock = staticmethod(time.monotonic)


class _Client(asyncio.Protocol):
    """One client with one request under way at most; `way` is how it holds its connection."""

    def __init__(self, crowd: _Crowd, way: str) -> None:
        self.crowd = crowd
        self.way = way
        self.one: Asked | None = None
        self.lasts = False  # as far as its server has said
        self.late: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on its connection, as far as a client can tell."""
        return self.lasts and not self.transport.is_closing()

    async def connect(self) -> None:
        """Open a connection, in place of the one before."""
        await self.crowd.loop.create_connection(lambda: self, "127.0.0.1", self.crowd.traffic.port)

    async def begin(self, one: Asked) -> None:
        """Open a connection and ask on it."""
        try:
            async with asyncio.timeout(_PATIENCE):
                await self.connect()
        except (OSError, TimeoutError) as error:
            one.began, one.way = self.crowd.clock(), self.way
            one.fault = f"refused: {error!r}"
            self.crowd.answered(self, one)
        else:
            self.ask(one)

    def ask(self, one: Asked) -> None:
        """Send a request."""
        self.one = one
        self.body: list[bytes] = []
        self.parser: Any = httptools.HttpResponseParser(self)
        one.way, one.began = self.way, self.crowd.clock()
        self.late = self.crowd.loop.call_later(_PATIENCE, self.over, "late")
        self.transport.write(_message(one, self.crowd.traffic, close=self.way == "new"))

    def over(self, fault: str) -> None:
        """The request has ended; a fault says that this was not by an answer."""
        one, self.one = self.one, None
        if one is None:
            return
        if self.late is not None:
            self.late.cancel()
        if fault:
            one.fault, one.status = fault, 0
            self.lasts = False
            self.transport.abort()
        if self.way == "new":
            self.transport.close()
        self.crowd.answered(self, one)

    # --- events -----------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.lasts = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lasts = False
        self.over(f"broken: {exc!r}" if exc else "closed within an answer or before it")

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.over(f"not HTTP: {error}")

    def on_header(self, name: bytes, value: bytes) -> None:
        one = self.one
        if one is None:
            return
        name = name.lower()
        if name == b"x-shipworthy-inference":
            one.inference = value.decode()
        elif name == b"x-shipworthy-release":
            one.release = value.decode()
        elif name == b"connection" and value.lower() == b"close":
            self.lasts = False

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        one = self.one
        if one is None:
            return
        one.status = self.parser.get_status_code()
        fault = ""
        if one.status == 200:
            try:
                one.said = _said(one.kind, b"".join(self.body))
            except (ValueError, KeyError, IndexError, msgspec.MsgspecError) as error:
                fault = f"half an answer: {error!r}, {b''.join(self.body)[-200:]!r}"
        if not self.lasts:
            self.transport.close()
        self.over(fault)


def _message(one: Asked, traffic: Traffic, *, close: bool) -> bytes:
    if one.kind == "infer":
        path = f"/v2/models/{one.model}/infer"
        tensor = {"name": "number", "datatype": "INT64", "shape": [1], "data": [one.number]}
        document: dict[str, Any] = {"inputs": [tensor]}
    else:
        path = "/v1/chat/completions"
        message = {"role": "user", "content": str(one.number)}
        document = {"model": one.model, "messages": [message]}
        if one.kind == "stream":
            document["stream"] = True
    body = msgspec.json.encode(document)
    unit = f"X-Shipworthy-Unit: {one.unit}\r\n" if one.unit else ""
    ending = "Connection: close\r\n" if close else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer"
        f" {traffic.keys[one.key]}\r\nContent-Type: application/json\r\n{unit}{ending}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _said(kind: Kind, body: bytes) -> tuple[int, int, int]:
    """What the server said of itself; ValueError for less than a whole answer."""
    if kind == "infer":
        version, place, number = msgspec.json.decode(body)["outputs"][0]["data"]
        return version, place, number
    if kind == "stream" and not body.endswith(b"data: [DONE]\n\n"):
        raise ValueError("the stream does not end as one")
    version, place, number = b"".join(_CONTENT.findall(body)).split()
    return int(version), int(place), int(number)
