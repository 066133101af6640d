"""A gateway worker: one process that listens, answers, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import secrets
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from email.utils import formatdate
from typing import Any

import msgspec
import uvloop

from shipworthy.errors import Unavailable
from shipworthy.gateway.accepting import Acceptor, Certificate, Relay
from shipworthy.gateway.application import Application
from shipworthy.gateway.connection import Connections
from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.parts import Outside, Parts, assemble
from shipworthy.gateway.upstream import Upstream

_log = logging.getLogger("shipworthy.gateway")

_BACKLOG = 2048
_LINGER_SECONDS = 1.0
_RELAY_SECONDS = 2.0  # that other workers may need to take connections
_OWN_DESCRIPTORS = 64  # journal, snapshot, listener, event loop, health probes

Ready = Callable[[str, int], None]
"""Called with host and port once the worker listens."""


def run(
    options: GatewayOptions,
    outside: Outside,
    *,
    metrics: Metrics | None = None,
    heartbeat: Callable[[], object] = lambda: None,
    ready: Ready | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, on a uvloop of its own; see `serve`."""
    options = _with_descriptors(options)
    gc.freeze()  # what is loaded by now stays: no need to look at it again and again
    gc.set_threshold(10_000, 20, 50)
    uvloop.run(serve(options, outside, metrics=metrics, heartbeat=heartbeat, ready=ready))


async def serve(
    options: GatewayOptions,
    outside: Outside,
    *,
    metrics: Metrics | None = None,
    heartbeat: Callable[[], object] = lambda: None,
    ready: Ready | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`, then finish what is under way.

    `heartbeat` is called every second by the loop that answers; `metrics` are those of this worker,
    its alone if none are given.

    Raises Unavailable when it can't listen, and UsageError for a secret that is too short.
    """
    ending = stop or asyncio.Event()
    metrics = metrics or Metrics()
    async with Upstream(options, lambda _: metrics.ejections.inc()) as upstream:
        parts = assemble(options, outside, upstream, metrics, secrets.token_bytes(4))
        application = Application(parts)
        loop = asyncio.get_running_loop()
        connections = Connections(application, options, metrics, parts.memory, loop)
        application.connections = connections
        parts.follower.poll()
        secure = Certificate(options.tls) if options.tls else None
        with _stopped_by_signals(ending):
            async with (
                # Both go on while it drains: keys are revoked then, too.
                _in_background(_each_second(connections, parts, secure, heartbeat)),
                _in_background(parts.follower.follow(options.snapshot_seconds)),
                _listening(options, connections, secure) as address,
            ):
                _announce(options, address, ready)
                await ending.wait()
                application.draining = connections.draining = True
                await asyncio.sleep(options.unready_seconds)
        application.close()


def _with_descriptors(options: GatewayOptions) -> GatewayOptions:
    """Let this process open as many files as its connections need, or serve fewer connections.

    Clients must never use up the descriptors that calls upstream, snapshot and journal need: what
    is missing there would look like the releases' failure.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Twice the connections: those beyond the limit are told so. A call has one, and one upstream.
    needed = 4 * options.max_connections + _OWN_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return options
    fewer = max(1, (soft - _OWN_DESCRIPTORS) // 4)
    _log.warning(
        "this process may open %d files, so it serves %d connections and not %d; raise `ulimit -n`",
        soft, fewer, options.max_connections,
    )  # fmt: skip
    return msgspec.structs.replace(options, max_connections=fewer)


# --- listening --------------------------------------------------------------------------------


def _bind(options: GatewayOptions) -> socket.socket:
    host, port = options.host, options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Unavailable(f"{host!r} is no address to listen on; set another host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            problem = (
                f"port {port} on {host} is in use; stop what listens there or set another port"
            )
        else:
            problem = f"port {port} on {host} can't be opened ({error.strerror}); set another one"
        raise Unavailable(problem) from error
    return listener


@contextlib.asynccontextmanager
async def _listening(
    options: GatewayOptions, connections: Connections, secure: Certificate | None
) -> AsyncGenerator[tuple[str, int]]:
    """Accept connections; on leaving, no new ones, and those that are there finish."""
    if options.sockets:
        listeners = [socket.socket(fileno=descriptor) for descriptor in options.sockets]
    else:
        listeners = [_bind(options)]
    relay = Relay(options.relay, connections) if options.relay else None
    takers = [*(Acceptor(listener, connections, secure) for listener in listeners)]
    takers += [relay] if relay else []
    for taker in takers:
        taker.start()
    named = next((one for one in listeners if one.family != socket.AF_UNIX), None)
    host, port = named.getsockname()[:2] if named is not None else ("", 0)
    try:
        yield host, port
    finally:
        for taker in takers:
            taker.stop()
        await _drain(connections, relay, options.drain_seconds)
        if relay is not None:
            relay.close()


async def _drain(connections: Connections, relay: Relay | None, seconds: float) -> None:
    """Let requests under way finish for so long, then end them; they still get an answer.

    Clients that keep a connection have a moment to use it once more, and are told then that it
    ends. Closing the others would break what is on its way just then, so another worker gets them;
    where none takes them in time, or can, they are closed.
    """
    connections.draining = True
    begun = time.monotonic()
    while (connections.open or connections.arriving) and time.monotonic() < begun + seconds:
        await asyncio.sleep(0.02)
        waited = time.monotonic() - begun
        if waited > _LINGER_SECONDS:
            _let_go(connections, relay, patient=waited < _LINGER_SECONDS + _RELAY_SECONDS)
    tasks = [*connections.tasks, *connections.arriving]
    if tasks:
        _log.warning("%d requests did not end in %g s and are cut off", len(tasks), seconds)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1.0)
    for connection in list(connections.open):
        connection.end()


def _let_go(connections: Connections, relay: Relay | None, *, patient: bool) -> None:
    """Give the idle connections away, or close them; with patience, some may have to wait."""
    for connection in list(connections.open):
        try:
            given = relay is not None and relay.give(connection)
        except OSError:  # the others have not taken those before it yet
            given = patient
        if not given:
            connection.shutdown(_LINGER_SECONDS)


async def _each_second(
    connections: Connections,
    parts: Parts,
    secure: Certificate | None,
    heartbeat: Callable[[], object],
) -> None:
    """What need not be done for each answer: the Date header, settling the metrics, and so on."""
    loop = asyncio.get_running_loop()
    while True:
        heartbeat()
        parts.metrics.snapshot_age.set(parts.follower.age())
        parts.metrics.connections.set(len(connections.open))
        parts.metrics.settle()
        parts.fleet.sweep(loop.time())
        for state, count in parts.fleet.endpoints().items():
            parts.metrics.endpoints.set(count, state)
        if secure is not None:
            secure.look()
        connections.date = b"date: %s\r\n" % formatdate(time.time(), usegmt=True).encode()
        await asyncio.sleep(1.0)


# --- life -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stopped_by_signals(ending: asyncio.Event) -> Generator[None]:
    """SIGTERM and SIGINT end the worker, where signals can be caught at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for one in signals:
        loop.add_signal_handler(one, ending.set)
    try:
        yield
    finally:
        for one in signals:
            loop.remove_signal_handler(one)


@contextlib.asynccontextmanager
async def _in_background(work: Any) -> AsyncGenerator[None]:
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _announce(options: GatewayOptions, address: tuple[str, int], ready: Ready | None) -> None:
    host, port = address
    _log.info("listening on http://%s:%d", host, port)
    if options.ready_file is not None:
        content = {"host": host, "port": port, "pid": os.getpid()}
        partial = options.ready_file.with_name(f".{options.ready_file.name}.{os.getpid()}")
        try:
            partial.write_bytes(msgspec.json.encode(content))
            partial.replace(options.ready_file)
        except OSError as error:  # a full disk: serving goes on, as far as its port is known
            _log.error("can't say so in %s: %s", options.ready_file, error.strerror)
            partial.unlink(missing_ok=True)
    if ready is not None:
        ready(host, port)
