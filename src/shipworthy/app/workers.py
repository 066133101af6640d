"""The gateway's workers: several processes on the same sockets, each kept running on its own.

Replacing one drops nothing: the new process is started beside the old one and, once it says that it
is ready, the old one accepts no more, answers what it has begun, gives the connections that clients
keep to the others, and ends.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from shipworthy.app.certificates import check_certificate
from shipworthy.app.children import Child, ChildState, Renewal
from shipworthy.app.exporting import OtlpOptions, check_extra
from shipworthy.app.gateway_worker import WorkerOptions, worker_name
from shipworthy.app.listening import Listeners
from shipworthy.errors import ShipworthyError, Unavailable
from shipworthy.ports import Clock
from shipworthy.settings import OtlpSettings, Project, load_project

log = logging.getLogger(__name__)

READY_SECONDS = 60.0
_SILENCE = 10.0  # its loop says it, and may be held up by the largest of bodies
_BEYOND_DRAIN = 10.0  # seconds that it may take to end when all that it had begun is done
_LOOK_SECONDS = 0.05
_FEW_DAYS = 14 * 86_400.0


@dataclass(slots=True, eq=False)
class _Running:
    """A process in a place, and what keeps it running."""

    child: Child
    keeping: asyncio.Task[None]
    drain: float

    async def end(self) -> None:
        """Let it answer what it has begun."""
        await self.child.stop(self.drain + _BEYOND_DRAIN)
        await self.keeping


@dataclass(slots=True)
class Workers:
    """All workers of an `up`; `places` holds those that count, by their index.

    `relay` is where one that ends puts the connections that clients keep, for another to take.
    """

    listeners: Listeners
    clock: Clock
    metrics: Path
    project: Project
    renewal: Renewal = field(default_factory=Renewal)
    relay: tuple[socket.socket, socket.socket] = field(
        default_factory=partial(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)
    )
    _places: list[_Running] = field(default_factory=list[_Running])
    _all: set[_Running] = field(default_factory=set[_Running])
    _closed: bool = False

    @property
    def states(self) -> tuple[ChildState, ...]:
        """What is known of each."""
        return tuple(place.child.state for place in self._places)

    def start(self) -> None:
        """Start them all."""
        for index in range(self.project.settings.gateway.workers):
            self._places.append(self._begin(self.project, index))

    async def ready(self, stop: asyncio.Event) -> bool:
        """Wait until the first one serves; False when told to stop before.

        Raises Unavailable when none can be started.
        """
        deadline = time.monotonic() + READY_SECONDS
        while not stop.is_set():
            children = [place.child for place in self._places]
            if any(child.ready for child in children):
                return True
            late = time.monotonic() > deadline
            if late or all(child.restarts > 2 for child in children):
                first = children[0]
                raise Unavailable(first.problem or f"{first.name} did not start; see its log")
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def renew(self) -> None:
        """Replace each process by a new one, with what the settings now say.

        It ends at the first new one that does not become ready: that one's place and those behind
        it keep the processes that they have. How it goes is told in `renewal`.
        """
        number = self.renewal.number + 1
        self.renewal = Renewal(number=number, running=True, of=len(self._places))
        problem, notes = "", ()
        try:
            project, notes = _reread(self.project, self.clock())
            self.renewal = msgspec.structs.replace(
                self.renewal, of=project.settings.gateway.workers, notes=notes
            )
            await self._renew(project)
        except ShipworthyError as error:
            problem = str(error)
            log.warning("the gateway is not restarted: %s", problem)
        except Exception as fault:  # a later one may go well
            problem = f"a fault of ours ({fault!r}); see the log of 'shipworthy up'"
            log.exception("the gateway is not restarted")
        finally:
            self.renewal = msgspec.structs.replace(self.renewal, running=False, problem=problem)

    async def stop(self) -> None:
        """Let all answer what they have begun, and end."""
        self._closed = True
        await asyncio.gather(*(each.end() for each in list(self._all)))

    def kill(self) -> None:
        """End all by force, now and for good."""
        self._closed = True
        for each in self._all:
            each.child.kill()

    async def gone(self) -> None:
        """Wait for their ends behind a `kill` or `stop`, and leave no numbers behind."""
        await asyncio.gather(*(each.keeping for each in list(self._all)), return_exceptions=True)
        for end in self.relay:
            end.close()
        shutil.rmtree(self.metrics.parent, ignore_errors=True)

    async def _renew(self, project: Project) -> None:
        wanted = project.settings.gateway.workers
        for index in range(wanted):
            new = self._begin(project, index)
            await self._become_ready(new)
            if index < len(self._places):
                old, self._places[index] = self._places[index], new
                await self._end(old)
            else:
                self._places.append(new)
            self.renewal = msgspec.structs.replace(self.renewal, done=index + 1)
        surplus, self._places = self._places[wanted:], self._places[:wanted]
        for old in surplus:
            await self._end(old)
        self.project = project

    async def _become_ready(self, new: _Running) -> None:
        deadline, child = time.monotonic() + READY_SECONDS, new.child
        while not child.ready:
            late = time.monotonic() > deadline
            if self._closed or late or child.restarts:
                problem = child.problem or f"the new {child.name} did not get ready in time"
                child.kill()
                await new.keeping
                self._all.discard(new)
                raise Unavailable(f"{problem}; the old one serves on")
            await asyncio.sleep(_LOOK_SECONDS)

    async def _end(self, old: _Running) -> None:
        await old.end()
        self._all.discard(old)

    def _begin(self, project: Project, index: int) -> _Running:
        """Start a process for a place, which may have one already."""
        settings, name = project.settings, worker_name(index)
        certificate, key = project.certificate, project.private_key
        relay = self.relay[0].fileno(), self.relay[1].fileno()
        options = WorkerOptions(
            index=index,
            workers=settings.gateway.workers,
            sockets=self.listeners.descriptors,
            relay=relay,
            certificate=str(certificate) if certificate else None,
            key=str(key) if key else None,
            max_body=settings.gateway.max_body_bytes,
            access_log=settings.gateway.access_log,
            drain_seconds=settings.gateway.drain,
            journal_bytes=settings.journal.max_bytes,
            metrics=str(self.metrics),
            otlp=_otlp(settings.gateway.otlp),
        )
        module, told = "shipworthy.app.gateway_worker", msgspec.json.encode(options).decode()
        child = Child(
            name,
            (sys.executable, "-m", module, str(project.state), told),
            project.logs / f"{name}.log",
            _SILENCE,
            self.clock,
            (*self.listeners.descriptors, *relay),
        )
        running = _Running(child, asyncio.create_task(child.run()), settings.gateway.drain)
        self._all.add(running)
        return running


def _otlp(settings: OtlpSettings | None) -> OtlpOptions | None:
    if settings is None:
        return None
    return OtlpOptions(endpoint=settings.endpoint, headers=settings.headers, sample=settings.sample)


def is_worker(child: ChildState) -> bool:
    """Whether a child of `up` is one of the gateway's workers."""
    return child.name.startswith(worker_name(""))


def make_workers(project: Project, listeners: Listeners, clock: Clock) -> Workers:
    """The workers of a new `up`, none of them started; numbers of the one before are forgotten."""
    shutil.rmtree(project.metrics, ignore_errors=True)
    # A name of its own: what is left of a killed `up` may still write into the old one.
    return Workers(listeners, clock, project.metrics / str(time.time_ns()), project)


def check_gateway(project: Project, now: float) -> tuple[str, ...]:
    """See that workers can be started with these settings; gives what a person should know.

    Raises UsageError for what they can't be started with.
    """
    if project.settings.gateway.otlp is not None:
        check_extra()
    return tuple(certificate_notes(project, now))


def certificate_notes(project: Project, now: float) -> Iterator[str]:
    """What a person should know about the certificate. Raises UsageError when it is of no use."""
    if project.certificate is None or project.private_key is None:
        return
    left = check_certificate(project.certificate, project.private_key, now)
    if left < 0:
        yield f"{project.certificate} has expired, so clients will refuse it; renew it"
    elif left < _FEW_DAYS:
        yield f"{project.certificate} expires in {left / 86_400:.1f} days; renew it"


def _reread(before: Project, now: float) -> tuple[Project, tuple[str, ...]]:
    """The project with its settings of now, and what of them can't be followed.

    Raises ShipworthyError for settings that nothing can be started with.
    """
    project = load_project(before.root)
    notes = [*check_gateway(project, now)]
    was, now_set = before.settings.gateway, project.settings.gateway
    kept = {
        key: getattr(was, key)
        for key in ("host", "port", "unix_socket")
        if getattr(was, key) != getattr(now_set, key)
    }
    if (was.tls is None) != (now_set.tls is None):
        kept["tls"] = was.tls
    if kept:
        names = " and ".join(f"gateway.{key}" for key in kept)
        notes.append(f"{names} changed: end 'shipworthy up' and start it again for that")
    gateway = now_set.model_copy(update=kept)
    settings = project.settings.model_copy(update={"gateway": gateway})
    return Project(project.root, settings), tuple(notes)
