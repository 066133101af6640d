"""`shipworthy up`: one process that keeps keeper, gateway and replicas of a project running.

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
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec

from shipworthy.app.access import admin_key
from shipworthy.app.fleet import Fleet
from shipworthy.app.gateway_address import gateway_file, gateway_url
from shipworthy.app.gateway_worker import WorkerOptions
from shipworthy.app.http import AiohttpClient
from shipworthy.app.processes import Child
from shipworthy.app.serving import make_runtimes
from shipworthy.app.session import Session
from shipworthy.app.status import LOCK
from shipworthy.errors import Conflict, ShipworthyError, Unavailable
from shipworthy.ports import Runtime
from shipworthy.settings import Project

log = logging.getLogger(__name__)

RECONCILE_SECONDS = 0.2
READY_SECONDS = 60.0
_GATEWAY_GRACE, _KEEPER_GRACE = 30.0, 10.0


@dataclass(frozen=True, slots=True)
class Up:
    """What runs: for whoever started it."""

    url: str
    admin_key: str
    keeper: Child
    gateway: Child


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


async def supervise(
    session: Session, *, on_ready: Callable[[Up], Awaitable[object]], stop: asyncio.Event
) -> None:
    """Keep everything running until `stop`, then drain and end it: gateway first, keeper last.

    Raises Conflict when another one does so already, Unavailable when the gateway's port is taken.
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
    key = admin_key(session)
    gateway_file(project).unlink(missing_ok=True)
    keeper, gateway = _children(project)
    fleet = Fleet(session.ledger, runtime)
    running = [asyncio.create_task(child.run()) for child in (keeper, gateway)]
    reconciling = asyncio.create_task(_reconcile(fleet, stop))
    try:
        url = await _ready(project, gateway, stop)
        if url is not None:
            await on_ready(Up(url, key, keeper, gateway))
            await stop.wait()
    finally:
        stop.set()
        await gateway.stop(_GATEWAY_GRACE)
        await asyncio.gather(reconciling, return_exceptions=True)
        await fleet.close()
        await keeper.stop(_KEEPER_GRACE)
        await asyncio.gather(*running, return_exceptions=True)
        gateway_file(project).unlink(missing_ok=True)


def stop_on_signals(stop: asyncio.Event) -> None:
    """Let Ctrl-C and SIGTERM end things in order."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)


def _children(project: Project) -> tuple[Child, Child]:
    settings = project.settings
    options = WorkerOptions(
        worker="worker-0",
        host=settings.gateway.host,
        port=settings.gateway.port,
        max_body=settings.gateway.max_body_bytes,
        journal_bytes=settings.journal.max_bytes,
    )
    python = (sys.executable, "-m")
    keeper = Child(
        "keeper",
        (*python, "shipworthy.app.keeping", str(project.root)),
        project.logs / "keeper.log",
    )
    gateway = Child(
        "gateway",
        (
            *python,
            "shipworthy.app.gateway_worker",
            str(project.state),
            msgspec.json.encode(options).decode(),
        ),
        project.logs / "gateway.log",
    )
    return keeper, gateway


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
