"""`shipworthy up`: one process that keeps keepers, gateway, lake writer and replicas running.

It decides nothing. It can be killed at any moment: its children end with it, and what was decided
stands in the ledger.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec

from shipworthy.app.access import admin_key
from shipworthy.app.children import Child, Processes, processes_file
from shipworthy.app.fleet import Fleet
from shipworthy.app.gateway_address import gateway_file, gateway_url
from shipworthy.app.gateway_worker import WorkerOptions
from shipworthy.app.http import AiohttpClient
from shipworthy.app.place import check_here, elsewhere
from shipworthy.app.serving import make_runtimes
from shipworthy.app.session import Session
from shipworthy.app.status import LOCK
from shipworthy.errors import Conflict, ShipworthyError, Unavailable
from shipworthy.ports import Runtime
from shipworthy.rollout.keeper import LEASE_SECONDS
from shipworthy.settings import Project
from shipworthy.stores.files import replace_file

log = logging.getLogger(__name__)

RECONCILE_SECONDS = 0.2
READY_SECONDS = 60.0
_GATEWAY_GRACE, _KEEPER_GRACE, _LAKE_GRACE = 30.0, 10.0, 30.0
_KEEPER_SILENCE = 5.0  # it may have been stopped amid a transaction, and then nobody can write
_GATEWAY_SILENCE = 10.0  # its loop says it, and may be held up by the largest of bodies
_LAKE_SILENCE = 15.0  # nobody waits for it
_TELL_SECONDS = 0.2
INTERRUPTED = 130
"""The exit code after a second signal."""


@dataclass(frozen=True, slots=True)
class Up:
    """What runs: for whoever started it."""

    url: str
    admin_key: str
    stopping: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Family:
    """The children; all keepers are alike, and any of them may be in office."""

    gateway: Child
    keepers: tuple[Child, ...]
    lake: Child

    def __iter__(self) -> Iterator[Child]:
        yield from (*self.keepers, self.lake, self.gateway)


@contextmanager
def only_one(project: Project) -> Generator[None]:
    """Hold the project's lock; Conflict when another `up` has it."""
    with (project.state / LOCK).open("a+b") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            pid = handle.read(20).decode(errors="replace").strip()
            message = f"'shipworthy up' runs here already (process {pid}); stop that one first"
            raise Conflict(message) from None
        handle.truncate(0)
        handle.write(str(os.getpid()).encode())
        handle.flush()
        yield


def run(session: Session, on_ready: Callable[[Up], Awaitable[object]]) -> int:
    """`supervise` until Ctrl-C or SIGTERM; the exit code. A second one ends everything at once."""

    async def until_signalled() -> None:
        stop = asyncio.Event()
        _stop_on_signals(stop)
        await supervise(session, on_ready=on_ready, stop=stop)

    try:
        asyncio.run(until_signalled())
    except asyncio.CancelledError:
        return INTERRUPTED
    return 0


async def supervise(
    session: Session, *, on_ready: Callable[[Up], Awaitable[object]], stop: asyncio.Event
) -> None:
    """Keep everything running until `stop`, then drain and end it in order.

    First the gateway, which answers what is under way, then replicas and keepers, and the lake's
    writer last. When this is cancelled, all end at once.

    Raises Conflict when another one does so already, here or for the same ledger elsewhere, and
    Unavailable when the gateway's port is taken.
    """
    project = session.project
    with only_one(project):
        async with AiohttpClient() as http:
            await _supervise(session, make_runtimes(session, http), on_ready, stop)


async def _supervise(
    session: Session,
    runtime: Runtime,
    on_ready: Callable[[Up], Awaitable[object]],
    stop: asyncio.Event,
) -> None:
    project = session.project
    _check_port(project)
    await _no_one_elsewhere(session, stop)
    key = admin_key(session)
    gateway_file(project).unlink(missing_ok=True)
    family = _family(session)
    fleet = Fleet(session.ledger, runtime, lambda term: check_here(project, term, session.clock()))
    running = [asyncio.create_task(child.run()) for child in family]
    telling = asyncio.create_task(_tell(session, family))
    reconciling = asyncio.create_task(_reconcile(fleet, stop))
    try:
        url = await _ready(project, family.gateway, stop)
        if url is not None:
            await on_ready(Up(url, key, stop.is_set))
            await stop.wait()
    finally:
        stop.set()
        try:
            if not _is_cancelled():
                await _end_in_order(family, fleet, reconciling)
        finally:
            for child in family:
                child.kill()
            telling.cancel()
            await asyncio.gather(reconciling, telling, *running, return_exceptions=True)
            for file in (gateway_file(project), processes_file(project)):
                file.unlink(missing_ok=True)


async def _end_in_order(family: _Family, fleet: Fleet, reconciling: asyncio.Task[None]) -> None:
    """Answer what is under way, have it counted, and moved to the lake with what came of it.

    Keepers end one after the other: what the first gives up, the next takes over at once.
    """
    await family.gateway.stop(_GATEWAY_GRACE)
    await asyncio.gather(reconciling, return_exceptions=True)
    closing = asyncio.create_task(fleet.close())
    for keeper in reversed(family.keepers):
        await keeper.stop(_KEEPER_GRACE)
    await family.lake.stop(_LAKE_GRACE)
    await closing


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _stop_on_signals(stop: asyncio.Event) -> None:
    """Let the first Ctrl-C or SIGTERM end things in order, and the second at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def end() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)


def _family(session: Session) -> _Family:
    project, settings = session.project, session.project.settings
    options = WorkerOptions(
        worker="worker-0",
        host=settings.gateway.host,
        port=settings.gateway.port,
        max_body=settings.gateway.max_body_bytes,
        journal_bytes=settings.journal.max_bytes,
    )
    gateway = (str(project.state), msgspec.json.encode(options).decode())
    keepers = ("keeper", "standby") if settings.keeper.standby else ("keeper",)

    def child(name: str, module: str, silence: float, *arguments: str) -> Child:
        return Child(
            name,
            (sys.executable, "-m", f"shipworthy.app.{module}", *arguments),
            project.logs / f"{name.replace(' ', '-')}.log",
            silence,
            session.clock,
        )

    root = str(project.root)
    return _Family(
        gateway=child("gateway", "gateway_worker", _GATEWAY_SILENCE, *gateway),
        keepers=tuple(child(name, "keeping", _KEEPER_SILENCE, root) for name in keepers),
        lake=child("lake writer", "lake_writing", _LAKE_SILENCE, root),
    )


def _check_port(project: Project) -> None:
    """Say that a port is taken before anything is started."""
    host, port = project.settings.gateway.host, project.settings.gateway.port
    if port == 0:
        return
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        message = (
            f"the gateway can't listen on {host}:{port} ({error.strerror}); free the port, or set"
            " gateway.port in shipworthy.yaml (0 takes any free one)"
        )
        raise Unavailable(message) from error


async def _no_one_elsewhere(session: Session, stop: asyncio.Event) -> None:
    """Wait until the lease of keepers that died elsewhere has run out; Conflict where they live."""
    deadline = asyncio.get_running_loop().time() + 2 * LEASE_SECONDS
    while not stop.is_set():
        with session.ledger.read() as tx:
            term = tx.terms.current()
        if not elsewhere(session.project, term, session.clock()):
            return
        if asyncio.get_running_loop().time() > deadline:
            check_here(session.project, term, session.clock())
        await asyncio.sleep(0.1)


async def _ready(project: Project, gateway: Child, stop: asyncio.Event) -> str | None:
    """The gateway's address once it listens; None when told to stop before."""
    deadline = asyncio.get_running_loop().time() + READY_SECONDS
    while not stop.is_set():
        with suppress(Unavailable):
            return gateway_url(project)
        if gateway.restarts > 2 or asyncio.get_running_loop().time() > deadline:
            message = gateway.problem or f"the gateway did not start; see {gateway.log_file}"
            raise Unavailable(message)
        await asyncio.sleep(0.05)
    return None


async def _tell(session: Session, family: _Family) -> None:
    """Keep what is known about the children in their file."""
    file, since, told, refused = processes_file(session.project), session.clock(), None, ""
    while True:
        known = Processes(
            pid=os.getpid(),
            since=since,
            children=tuple(child.state for child in family),
        )
        if known != told:
            try:
                replace_file(file, msgspec.json.encode(known))
                told, refused = known, ""
            except Unavailable as error:
                if str(error) != refused:
                    log.warning("%s; 'shipworthy status' knows less until then", error)
                refused = str(error)
        await asyncio.sleep(_TELL_SECONDS)


async def _reconcile(fleet: Fleet, stop: asyncio.Event) -> None:
    """Bring replicas in line with the ledger, through its outages."""
    last = ""
    while not stop.is_set():
        try:
            await fleet.reconcile()
        except ShipworthyError as error:
            if str(error) != last:
                log.warning("%s; what runs goes on running", error)
            last = str(error)
        except Exception as fault:  # the next turn must still follow the ledger
            if repr(fault) != last:
                log.exception("a fault of ours; what runs goes on running")
            last = repr(fault)
        else:
            last = ""
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), RECONCILE_SECONDS)
