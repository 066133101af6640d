"""Runs what the keeper wants running, and reports what became of it.

The ledger says what is wanted; this starts and stops replicas until it is so. When the ledger can't
be reached everything that runs goes on running.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from shipworthy.domain.lifecycle import Deployment, DeploymentState, Release
from shipworthy.domain.names import ReleaseReference
from shipworthy.domain.terms import Term
from shipworthy.errors import ShipworthyError
from shipworthy.ports import Ledger, RunningReplica, Runtime

log = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 10.0


@dataclass(slots=True)
class _Running:
    """A deployment under way; `replicas` is empty until they have been started."""

    deployment: Deployment
    starting: asyncio.Task[list[RunningReplica]]
    replicas: list[RunningReplica] = field(default_factory=list[RunningReplica])
    problem: str = ""
    answered: bool = False

    def report(self) -> tuple[DeploymentState, tuple[str, ...], str]:
        """State, addresses that answer, and what is wrong if anything."""
        urls = tuple(replica.url for replica in self.replicas if replica.url is not None)
        problem = _clean(
            self.problem or next((one.problem for one in self.replicas if one.problem), "")
        )
        if urls:
            self.answered = True
            return DeploymentState.READY, urls, problem
        if problem:
            return DeploymentState.FAILED, (), problem
        doing = _clean(next((replica.doing for replica in self.replicas), ""))
        return DeploymentState.RESTARTING if self.answered else DeploymentState.STARTING, (), doing


@dataclass(slots=True)
class Fleet:
    """All replicas of a project on this machine.

    `check` raises when whoever holds the keeper's term decides for other replicas than these.
    """

    ledger: Ledger
    runtime: Runtime
    check: Callable[[Term], object]
    _running: dict[str, _Running] = field(default_factory=dict[str, _Running])
    _stopping: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    async def reconcile(self) -> None:
        """Take one step towards what is wanted.

        Raises LedgerUnavailable, or what `check` does, with nothing stopped.
        """
        wanted = await asyncio.to_thread(self._wanted)
        for id_, (deployment, release) in wanted.items():
            if id_ not in self._running and deployment.wanted:
                task = asyncio.create_task(self._start(release, deployment))
                self._running[id_] = _Running(deployment, task)
        for id_, running in list(self._running.items()):
            known = wanted.get(id_)
            if known is None or not known[0].wanted:
                del self._running[id_]
                self._stop_soon(running)
            else:
                self._collect(running)
        await asyncio.to_thread(self._report, wanted)

    async def close(self) -> None:
        """Stop everything that runs here; the ledger still wants it, so it starts again with us."""
        for running in self._running.values():
            self._stop_soon(running)
        self._running.clear()
        await asyncio.gather(*self._stopping, return_exceptions=True)

    def _wanted(self) -> dict[str, tuple[Deployment, Release]]:
        with self.ledger.read() as tx:
            self.check(tx.terms.current())
            found: dict[str, tuple[Deployment, Release]] = {}
            for deployment in tx.deployments.list():
                release = tx.releases.find(
                    ReleaseReference(deployment.model, digest=deployment.release)
                )
                if release is not None:
                    found[deployment.id] = (deployment, release)
            return found

    async def _start(self, release: Release, deployment: Deployment) -> list[RunningReplica]:
        return list(await self.runtime.start(release, deployment))

    @staticmethod
    def _collect(running: _Running) -> None:
        """Take over what starting has brought, replicas or the reason why there are none."""
        if running.replicas or running.problem or not running.starting.done():
            return
        error = running.starting.exception()
        if error is None:
            running.replicas = running.starting.result()
        elif isinstance(error, ShipworthyError):
            running.problem = str(error)
        else:
            log.error("starting %s failed", running.deployment.id, exc_info=error)
            running.problem = f"starting failed on a fault of ours ({type(error).__name__})"

    def _stop_soon(self, running: _Running) -> None:
        task = asyncio.create_task(self._stop(running))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    @staticmethod
    async def _stop(running: _Running) -> None:
        """Let a start that is under way end first, so that nothing is left behind."""
        await asyncio.wait([running.starting])
        Fleet._collect(running)
        await asyncio.gather(*(replica.stop(STOP_GRACE_SECONDS) for replica in running.replicas))

    def _report(self, wanted: dict[str, tuple[Deployment, Release]]) -> None:
        """Tell the ledger what changed."""
        changed: dict[str, tuple[DeploymentState, tuple[str, ...], str]] = {}
        for id_, (deployment, _) in wanted.items():
            running = self._running.get(id_)
            report = running.report() if running else (DeploymentState.STOPPED, (), "")
            if report != (deployment.state, deployment.endpoints, deployment.message):
                changed[id_] = report
        if not changed:
            return
        with self.ledger.write() as tx:
            self.check(tx.terms.current())
            for id_, (state, endpoints, message) in changed.items():
                current = tx.deployments.get(id_)
                if current is not None:
                    tx.deployments.put(
                        msgspec.structs.replace(
                            current, state=state, endpoints=endpoints, message=message
                        )
                    )


def _clean(said: str) -> str:
    """What a model said, without the characters that PostgreSQL or a terminal can't take."""
    return "".join(
        letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}"
        for letter in said
    )
