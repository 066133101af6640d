"""The server's side of `model_host`: starts the processes that hold the model, asks, restarts.

One host answers one request at a time; a pool has as many as requests may run at once. A host
that crashes, or hangs beyond the time limit and is killed, takes only its own request along.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from shipworthy.domain.contract import Datatype
from shipworthy.errors import RuntimeFailed
from shipworthy.protocols.oip import TensorValues
from shipworthy.protocols.packed import Packed, pack
from shipworthy.runtimes.folder import ModelFile

HOST_FILE: Final = Path(__file__).with_name("model_host.py")
_log = logging.getLogger(__name__)


class NotReady(Exception):
    """No host holds the model at the moment."""


class Busy(Exception):
    """As many requests wait as may."""


class PredictFailed(Exception):
    """The model raised; the message says what."""


class HostDied(Exception):
    """The host ended while it worked on the request."""


class TookTooLong(Exception):
    """The host was killed because it did not answer in time."""


# --- frames -----------------------------------------------------------------------------------


def host_command(python: Path, folder: Path, model: ModelFile, fd: int) -> list[str]:
    """How to start a host for the model in `folder`, its end of the socket being `fd`."""
    spec = {"folder": str(folder.resolve()), "path": model.path, "format": model.format}
    spec |= {"entry": model.entry, "unsafe": model.unsafe} if model.entry or model.unsafe else {}
    return [str(python), "-I", "-B", "-u", str(HOST_FILE), str(fd), json.dumps(spec)]


def request_frame(
    op: str, inputs: Iterable[TensorValues] = (), outputs: Sequence[str] | None = None
) -> bytes:
    """A request as the host reads it."""
    described: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    for tensor in inputs:
        raw = pack(tensor.datatype, tensor.data)
        parts.append(raw)
        shape = tensor.shape
        described.append(
            {"name": tensor.name, "datatype": tensor.datatype, "shape": shape, "size": len(raw)}
        )
    header = msgspec.json.encode({"op": op, "inputs": described, "outputs": outputs})
    body = b"".join(parts)
    return struct.pack("<II", len(header), len(body)) + header + body


def tensors_of(described: Iterable[dict[str, Any]], body: bytes) -> list[TensorValues]:
    """The tensors of an answer."""
    tensors: list[TensorValues] = []
    offset = 0
    view = memoryview(body)
    for tensor in described:
        datatype: Datatype = tensor["datatype"]
        shape: tuple[int, ...] = tuple(tensor["shape"])
        if datatype == "BYTES":
            data: Any = _texts(body[offset : offset + tensor["size"]])
        else:
            data = Packed(datatype, view[offset : offset + tensor["size"]])
        offset += tensor["size"]
        tensors.append(TensorValues(tensor["name"], datatype, shape, data))
    return tensors


def _texts(raw: bytes) -> list[str]:
    texts: list[str] = []
    offset = 0
    while offset < len(raw):
        (size,) = struct.unpack_from("<I", raw, offset)
        offset += 4 + size
        texts.append(raw[offset - size : offset].decode(errors="replace"))
    return texts


def answer_of(header: dict[str, Any]) -> dict[str, Any]:
    """The header itself, or what went wrong as PredictFailed or RuntimeFailed."""
    if "problem" in header:
        raise RuntimeFailed(header["problem"])
    if error := header.get("error"):
        raise PredictFailed(f"{error['type']}: {error['message']}".rstrip(": "))
    return header


def ending(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


# --- one host ---------------------------------------------------------------------------------


class _Channel(asyncio.Protocol):
    """Whole frames, one at a time: there is never more than one answer on its way."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiter: asyncio.Future[tuple[dict[str, Any], bytes]] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if len(buffer) < 8:
            return
        header_size, body_size = struct.unpack_from("<II", buffer)
        end = 8 + header_size + body_size
        if len(buffer) < end:
            return
        header = msgspec.json.decode(buffer[8 : 8 + header_size])
        body = bytes(buffer[8 + header_size : end])
        del buffer[:end]
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result((header, body))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._lost = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(HostDied())

    async def exchange(self, frame: bytes | None) -> tuple[dict[str, Any], bytes]:
        """Send a frame, if any, and wait for the next one that comes."""
        if self._lost or self._transport is None:
            raise HostDied
        self._waiter = asyncio.get_running_loop().create_future()
        if frame is not None:
            self._transport.write(frame)
        return await self._waiter

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Host:
    """A process that holds the model."""

    def __init__(self, process: asyncio.subprocess.Process, channel: _Channel) -> None:
        self._process = process
        self._channel = channel
        self.engine = ""
        self.engine_version = ""

    @classmethod
    async def start(cls, python: Path, folder: Path, model: ModelFile, timeout: float) -> Host:  # noqa: ASYNC109
        """Start a host and wait for it to hold the model; RuntimeFailed says why it does not."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *host_command(python, folder, model, theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # what the model prints belongs to the log
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # so that what it starts can be ended with it
                )
            except OSError as error:
                ours.close()
                raise RuntimeFailed(
                    f"the release's interpreter does not start ({error.strerror}: {python});"
                    " build its environment again"
                ) from error
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(_Channel, sock=ours)
        host = cls(process, channel)
        try:
            async with asyncio.timeout(timeout):
                header = answer_of((await channel.exchange(None))[0])
        except BaseException as error:
            code = await host.kill()
            if isinstance(error, HostDied):
                raise RuntimeFailed(
                    f"the model's process ended while it loaded {model.path} ({ending(code)});"
                    " the replica's log has its last words"
                ) from error
            if isinstance(error, TimeoutError):
                raise RuntimeFailed(
                    f"{model.path} took longer than {timeout:g} s to load; allow more time"
                ) from error
            raise
        host.engine, host.engine_version = header["engine"], header["engine_version"]
        return host

    async def predict(
        self, inputs: Iterable[TensorValues], outputs: Sequence[str] | None
    ) -> list[TensorValues]:
        """The model's answer; PredictFailed when it raised, HostDied when the process ended."""
        header, body = await self._channel.exchange(request_frame("predict", inputs, outputs))
        return tensors_of(answer_of(header)["outputs"], body)

    async def ended(self) -> int:
        """Wait for the process to end; its exit code."""
        return await self._process.wait()

    async def kill(self) -> int:
        """End the process and what it started, now; its exit code."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._channel.close()
        return await self._process.wait()


# --- the pool ---------------------------------------------------------------------------------


class HostPool:
    """`size` hosts of one model, each replaced when it ends.

    `start` makes one. `queue`: requests that may wait for a host. `timeout`: seconds that a host
    has for an answer, and that a request may wait for a host. `rng` spreads restarts in time.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Host]],
        *,
        size: int,
        queue: int,
        timeout: float,
        rng: random.Random,
    ) -> None:
        self._start = start
        self._size = size
        self._queue = queue
        self._timeout = timeout
        self._rng = rng
        self._alive: set[Host] = set()
        self._idle: list[Host] = []
        self._waiting: deque[asyncio.Future[Host]] = deque()
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether at least one host holds the model."""
        return bool(self._alive)

    async def open(self) -> Host:
        """Start all; returns the first that holds the model, RuntimeFailed when it does not."""
        first = await self._start()
        self._keepers = [
            asyncio.create_task(self._keep(first if index == 0 else None))
            for index in range(self._size)
        ]
        self._join(first)
        return first

    async def close(self) -> None:
        """End all hosts; what still waits is told that none is ready."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._dismiss_waiting()
        await asyncio.gather(*(host.kill() for host in self._alive))
        self._alive.clear()

    async def predict(
        self, inputs: Iterable[TensorValues], outputs: Sequence[str] | None
    ) -> list[TensorValues]:
        """The answer of whichever host is free first.

        NotReady, Busy, PredictFailed, HostDied or TookTooLong when there is none.
        """
        host = await self._borrow()
        try:
            async with asyncio.timeout(self._timeout):
                answer = await host.predict(inputs, outputs)
        except PredictFailed:
            self._give_back(host)
            raise
        except TimeoutError:
            await self._drop(host)
            raise TookTooLong(f"the model gave no answer within {self._timeout:g} s") from None
        except HostDied:
            code = await self._drop(host)
            raise HostDied(f"the model's process died on this request ({ending(code)})") from None
        except BaseException:  # cancelled: an answer may still come, and would be the next one's
            await self._drop(host)
            raise
        self._give_back(host)
        return answer

    async def _borrow(self) -> Host:
        if self._idle:
            return self._idle.pop()
        if not self._alive:
            raise NotReady("the model is being loaded again")
        if len(self._waiting) >= self._queue:
            raise Busy(f"{len(self._waiting)} requests are waiting already")
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._timeout):
                return await place
        except TimeoutError:
            raise Busy(f"no host was free within {self._timeout:g} s") from None
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(place)

    def _give_back(self, host: Host) -> None:
        if host not in self._alive:
            return
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(host)
                return
        self._idle.append(host)

    async def _drop(self, host: Host) -> int:
        self._leave(host)
        return await host.kill()

    def _join(self, host: Host) -> None:
        self._alive.add(host)
        self._give_back(host)

    def _leave(self, host: Host) -> None:
        self._alive.discard(host)
        if host in self._idle:
            self._idle.remove(host)
        if not self._alive:
            self._dismiss_waiting()

    def _dismiss_waiting(self) -> None:
        for place in self._waiting:
            if not place.done():
                place.set_exception(NotReady("the model is being loaded again"))

    async def _keep(self, host: Host | None) -> None:
        """Keep one place of the pool filled, ever slower while hosts die soon after their start."""
        quick_deaths = 0
        while True:
            if host is None:
                host = await self._restarted()
            if host is not None:
                born = asyncio.get_running_loop().time()
                code = await host.ended()
                self._leave(host)
                _log.warning("the model's process ended (%s) and is started again", ending(code))
                long_life = asyncio.get_running_loop().time() - born > LONG_LIFE
                quick_deaths = 0 if long_life else quick_deaths
                host = None
            await asyncio.sleep(backoff(quick_deaths, self._rng))
            quick_deaths += 1

    async def _restarted(self) -> Host | None:
        try:
            host = await self._start()
        except RuntimeFailed as failure:
            _log.warning("%s", failure)
            return None
        self._join(host)
        return host


LONG_LIFE: Final = 30.0
"""A process that lived this many seconds is not dying of its start."""


def backoff(failures: int, rng: random.Random, *, first: float = 0.1, most: float = 30.0) -> float:
    """Seconds to wait after this many failures in a row: doubling, half of it by chance."""
    return min(most, first * 2.0 ** min(failures, 20)) * (0.5 + rng.random() / 2)
