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
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import msgspec

from shipworthy.app.access import admin_key
from shipworthy.app.children import Child, Processes, processes_file
from shipworthy.app.fleet import Fleet
from shipworthy.app.gateway_address import GatewayAddress, gateway_file
from shipworthy.app.http import AiohttpClient
from shipworthy.app.listening import Listeners, listen
from shipworthy.app.place import check_here, elsewhere
from shipworthy.app.serving import make_runtimes
from shipworthy.app.session import Session
from shipworthy.app.status import LOCK
from shipworthy.app.workers import Workers, check_gateway, make_workers
from shipworthy.errors import Conflict, ShipworthyError, Unavailable
from shipworthy.ports import Runtime
from shipworthy.rollout.keeper import LEASE_SECONDS
from shipworthy.settings import Project
from shipworthy.stores.files import replace_file

log = logging.getLogger(__name__)

RECONCILE_SECONDS = 0.2
_KEEPER_GRACE, _LAKE_GRACE = 10.0, 30.0
_KEEPER_SILENCE = 5.0  # it may have been stopped amid a transaction, and then nobody can write
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
class Bell:
    """What `supervise` is told from outside: to end, and to restart the gateway's workers."""

    stop: asyncio.Event
    renew: asyncio.Event


@dataclass(frozen=True, slots=True)
class _Family:
    """The children beside the gateway's; keepers are alike, and any of them may be in office."""

    keepers: tuple[Child, ...]
    lake: Child

    def __iter__(self) -> Iterator[Child]:
        yield from (*self.keepers, self.lake)


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
    """`supervise` until Ctrl-C or SIGTERM; the exit code. A second one ends everything at once.

    SIGHUP restarts the gateway's workers, unless it says that our terminal is gone.
    """

    async def until_signalled() -> None:
        bell = Bell(asyncio.Event(), asyncio.Event())
        _heed_signals(bell)
        await supervise(session, on_ready=on_ready, bell=bell)

    try:
        asyncio.run(until_signalled())
    except asyncio.CancelledError:
        return INTERRUPTED
    return 0


async def supervise(
    session: Session, *, on_ready: Callable[[Up], Awaitable[object]], bell: Bell
) -> None:
    """Keep everything running until told to stop, then drain and end it in order.

    First the gateway, which answers what is under way, then replicas and keepers, and the lake's
    writer last. When this is cancelled, all end at once.

    Raises Conflict when another one does so already, here or for the same ledger elsewhere,
    Unavailable when the gateway's port is taken, and UsageError when its settings are of no use.
    """
    project = session.project
    with only_one(project):
        for note in check_gateway(project, session.clock()):
            log.warning("%s", note)
        with closing(listen(project)) as listeners:
            async with AiohttpClient() as http:
                runtime = make_runtimes(session, http)
                await _supervise(session, listeners, runtime, on_ready, bell)


async def _supervise(
    session: Session,
    listeners: Listeners,
    runtime: Runtime,
    on_ready: Callable[[Up], Awaitable[object]],
    bell: Bell,
) -> None:
    project, stop = session.project, bell.stop
    await _no_one_elsewhere(session, stop)
    key = admin_key(session)
    gateway_file(project).unlink(missing_ok=True)
    family, workers = _family(session), make_workers(project, listeners, session.clock)
    fleet = Fleet(session.ledger, runtime, lambda term: check_here(project, term, session.clock()))
    running = [asyncio.create_task(child.run()) for child in family]
    workers.start()
    telling = asyncio.create_task(_tell(session, family, workers))
    renewing = asyncio.create_task(_renew(workers, bell))
    reconciling = asyncio.create_task(_reconcile(fleet, stop))
    try:
        if await workers.ready(stop):
            url = _say_where(workers)
            await on_ready(Up(url, key, stop.is_set))
            await stop.wait()
    finally:
        stop.set()
        renewing.cancel()
        try:
            if not _is_cancelled():
                await _end_in_order(family, workers, fleet, reconciling)
        finally:
            for child in family:
                child.kill()
            workers.kill()
            telling.cancel()
            await asyncio.gather(
                reconciling, telling, renewing, workers.gone(), *running, return_exceptions=True
            )
            for file in (gateway_file(project), processes_file(project)):
                file.unlink(missing_ok=True)


async def _end_in_order(
    family: _Family, workers: Workers, fleet: Fleet, reconciling: asyncio.Task[None]
) -> None:
    """Answer what is under way, have it counted, and moved to the lake with what came of it.

    Keepers end one after the other: what the first gives up, the next takes over at once.
    """
    await workers.stop()
    await asyncio.gather(reconciling, return_exceptions=True)
    ending = asyncio.create_task(fleet.close())
    for keeper in reversed(family.keepers):
        await keeper.stop(_KEEPER_GRACE)
    await family.lake.stop(_LAKE_GRACE)
    await ending


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _heed_signals(bell: Bell) -> None:
    """Let the first Ctrl-C or SIGTERM end things in order, and the second at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    has_terminal, ignored = _has_terminal(), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def end() -> None:
        if bell.stop.is_set() and task is not None:
            task.cancel()
        bell.stop.set()

    def hang_up() -> None:
        if not has_terminal or _has_terminal():
            bell.renew.set()
        elif not ignored:  # as `nohup` wants it
            bell.stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, hang_up)


def _has_terminal() -> bool:
    """Whether we belong to a terminal, and somebody is at its other end."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _family(session: Session) -> _Family:
    project = session.project
    keepers = ("keeper", "standby") if project.settings.keeper.standby else ("keeper",)

    def child(name: str, module: str, silence: float) -> Child:
        return Child(
            name,
            (sys.executable, "-m", f"shipworthy.app.{module}", str(project.root)),
            project.logs / f"{name.replace(' ', '-')}.log",
            silence,
            session.clock,
        )

    return _Family(
        keepers=tuple(child(name, "keeping", _KEEPER_SILENCE) for name in keepers),
        lake=child("lake writer", "lake_writing", _LAKE_SILENCE),
    )


def _say_where(workers: Workers) -> str:
    """Write down where the gateway listens; gives its address as clients write it."""
    project, listeners = workers.project, workers.listeners
    address = GatewayAddress(
        host=listeners.host,
        port=listeners.port,
        pid=os.getpid(),
        unix_socket=str(listeners.unix_path) if listeners.unix_path else None,
        tls=str(project.certificate) if project.certificate else None,
    )
    try:
        replace_file(gateway_file(project), msgspec.json.encode(address))
    except Unavailable as error:  # a full disk: serving goes on, as far as its address is known
        log.warning("%s; commands don't find the gateway at %s", error, address.url)
    return address.url


async def _renew(workers: Workers, bell: Bell) -> None:
    """Restart the gateway's workers whenever told to."""
    while True:
        await bell.renew.wait()
        bell.renew.clear()
        await workers.renew()
        _say_where(workers)


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


async def _tell(session: Session, family: _Family, workers: Workers) -> None:
    """Keep what is known about the children in their file."""
    file, since, told, refused = processes_file(session.project), session.clock(), None, ""
    while True:
        known = Processes(
            pid=os.getpid(),
            since=since,
            children=(*(child.state for child in family), *workers.states),
            renewal=workers.renewal,
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
