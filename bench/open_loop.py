"""Open-loop load: requests are sent when they are due, whatever became of those before.

A client that waits for an answer before it asks again asks less of a server that stalls, and so
never sees most of the stall. Here each request has its time, and its latency counts from then,
also when no connection was free. The clock is a timer of the kernel's with a period below that of
event loops, which wake up by the millisecond.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import multiprocessing
import os
import time
from array import array
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import httptools
import msgspec
import uvloop
from upstreams import Unusable

_PERIOD = 0.0002  # seconds between looks at what is due
_WARM_UP = 0.5
_PATIENCE = 10.0
_SPARE = 64  # connections that are opened beforehand,
_MOST = 1024  # and at most


class Open(msgspec.Struct, frozen=True):
    """Latencies in seconds from when each request was due.

    `late` is the p99 of how long after that it was sent: the client's own share. `unanswered` were
    under way too long, `failed` were answered with an error.
    """

    rate: int
    answered: int
    failed: int
    unanswered: int
    p50: float
    p99: float
    worst: float
    late: float

    @property
    def kept(self) -> bool:
        """Whether the server kept up."""
        return not self.failed and not self.unanswered and self.p99 < 1.0


def open_loop(port: int, requests: list[bytes], *, rate: int, seconds: float) -> Open:
    """Send `rate` requests a second in a process of its own; `requests` take turns."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    client = context.Process(target=_run, args=(there, port, requests, rate, seconds), daemon=True)
    client.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise Unusable("the client of the open loop broke") from None
    finally:
        client.terminate()
        client.join()


def _run(pipe: Connection, port: int, requests: list[bytes], rate: int, seconds: float) -> None:
    pipe.send(uvloop.run(_Load(port, requests, rate, seconds).run()))


class _Load:
    """One run."""

    def __init__(self, port: int, requests: list[bytes], rate: int, seconds: float) -> None:
        self.port, self.requests, self.rate = port, requests, rate
        self.count = int(rate * (_WARM_UP + seconds))
        self.idle = deque["_Asking"]()
        self.due = deque[int]()
        self.connections = 0
        self.sent = 0  # how many fell due so far
        self.open = 0
        self.failed = 0
        self.took = array("d", bytes(8 * self.count))
        self.late = array("d", bytes(8 * self.count))
        self.whole = asyncio.Event()

    async def run(self) -> Open:
        for _ in range(min(_SPARE, max(2, self.rate))):
            await self.connect()
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause of the client's would count as the server's
        loop = asyncio.get_running_loop()
        self.began = time.perf_counter() + 0.01
        timer = _timer(_PERIOD)
        loop.add_reader(timer, self.tick, timer)
        limit = self.count / self.rate + _PATIENCE
        try:
            await asyncio.wait_for(self.whole.wait(), limit)
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(timer)
            os.close(timer)
        return self.outcome()

    def tick(self, timer: int) -> None:
        os.read(timer, 8)
        due = int((time.perf_counter() - self.began) * self.rate) + 1
        for number in range(self.sent, min(due, self.count)):
            self.sent = number + 1
            self.open += 1
            if self.idle:
                self.idle.popleft().ask(number)
            else:
                self.due.append(number)
                if self.connections < _MOST:
                    asyncio.get_running_loop().create_task(self.connect())

    async def connect(self) -> None:
        self.connections += 1
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _Asking(self), "127.0.0.1", self.port)
        except OSError:
            self.connections -= 1

    def scheduled(self, number: int) -> float:
        return self.began + number / self.rate

    def free(self, connection: _Asking) -> None:
        if self.due:
            connection.ask(self.due.popleft())
        else:
            self.idle.append(connection)

    def answered(self, number: int, *, success: bool) -> None:
        self.took[number] = time.perf_counter() - self.scheduled(number)
        self.failed += not success
        self.open -= 1
        if self.sent == self.count and not self.open:
            self.whole.set()

    def outcome(self) -> Open:
        first = int(self.rate * _WARM_UP)
        took = sorted(seconds for seconds in self.took[first:] if seconds)
        late = sorted(self.late[first:])
        return Open(
            rate=self.rate,
            answered=len(took),
            failed=self.failed,
            unanswered=self.open + self.count - self.sent,
            p50=percentile(took, 0.5),
            p99=percentile(took, 0.99),
            worst=percentile(took, 1.0),
            late=percentile(late, 0.99),
        )


class _Asking(asyncio.Protocol):
    """One connection with one request under way at most."""

    def __init__(self, load: _Load) -> None:
        self.load = load
        self.number: int | None = None

    def connection_made(self, transport: Any) -> None:
        self.write: Callable[[bytes], None] = transport.write
        self.parser = httptools.HttpResponseParser(self)
        self.load.free(self)

    def ask(self, number: int) -> None:
        self.number = number
        load = self.load
        load.late[number] = time.perf_counter() - load.scheduled(number)
        self.write(load.requests[number % len(load.requests)])

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        number, self.number = self.number, None
        if number is not None:
            self.load.answered(number, success=self.parser.get_status_code() == 200)
            self.load.free(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.load.connections -= 1
        if self in self.load.idle:
            self.load.idle.remove(self)
        if self.number is not None:
            self.load.answered(self.number, success=False)


def percentile(ordered: list[float], share: float) -> float:
    """The value that this share of them does not exceed; NaN of none."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _timer(period: float) -> int:
    """A file that can be read each `period` seconds."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    nanoseconds = int(period * 1e9)
    times = (ctypes.c_long * 4)(0, nanoseconds, 0, nanoseconds)  # the period, and up to the first
    if descriptor < 0 or libc.timerfd_settime(descriptor, 0, times, None):
        raise OSError(ctypes.get_errno(), "no timer")
    return descriptor
