"""What the doors of one worker share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shipworthy.gateway.http import BodyMemory
from shipworthy.gateway.live import Fleet
from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.needs import Clock, Journal
from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.snapshot import SnapshotFollower
from shipworthy.gateway.tickets import Pseudonyms, TicketOffice
from shipworthy.gateway.upstream import Upstream


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What a worker is given by whoever starts it; see `serve`."""

    journal: Journal
    newest_snapshot: Callable[[], Path | None]
    signing_secret: bytes
    pseudonym_secret: bytes
    clock: Clock
    uniform: Callable[[], float]
    monotonic: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A worker's parts. `worker` is four bytes that no other worker has."""

    options: GatewayOptions
    outside: Outside
    worker: bytes
    metrics: Metrics
    upstream: Upstream
    fleet: Fleet
    follower: SnapshotFollower
    tickets: TicketOffice
    pseudonyms: Pseudonyms
    memory: BodyMemory


def assemble(
    options: GatewayOptions, outside: Outside, upstream: Upstream, metrics: Metrics, worker: bytes
) -> Parts:
    """Make the parts; UsageError for a secret that is too short."""
    fleet = Fleet(options)
    return Parts(
        options=options,
        outside=outside,
        worker=worker,
        metrics=metrics,
        upstream=upstream,
        fleet=fleet,
        follower=SnapshotFollower(
            outside.newest_snapshot,
            clock=outside.clock,
            monotonic=outside.monotonic,
            changed=fleet.obey,
            refused=lambda why: metrics.refused_snapshots.labels(why).inc(),
        ),
        tickets=TicketOffice(outside.signing_secret, worker=worker),
        pseudonyms=Pseudonyms(outside.pseudonym_secret),
        memory=BodyMemory(options.max_buffered),
    )
