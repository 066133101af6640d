"""What the doors of one worker share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from shipworthy.domain.plan import Limits, Plan, Snapshot
from shipworthy.domain.records import InferenceRecord
from shipworthy.gateway.http import BodyMemory
from shipworthy.gateway.limits import LimitBook
from shipworthy.gateway.live import Fleet
from shipworthy.gateway.metrics import Metrics
from shipworthy.gateway.needs import Clock, Journal, UsageTable
from shipworthy.gateway.options import GatewayOptions
from shipworthy.gateway.snapshot import SnapshotFollower
from shipworthy.gateway.spans import Attempt
from shipworthy.gateway.tickets import Pseudonyms, TicketOffice
from shipworthy.gateway.traces import TraceContext, context_of
from shipworthy.gateway.upstream import Upstream


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What a worker is given by whoever starts it.

    `journal` stays the caller's to close. Both secrets must be the same in all workers and after a
    restart: the one signs inference ids, the other keys the pseudonyms of units. `uniform` draws
    from [0, 1). `newest_snapshot` finds the file to obey; without one yet, the worker listens and
    says that it is not ready. `limits` is what keys and models have used on this host; without it
    none is limited. `context` says where a request stands in its trace, and `export` takes the
    records of those whose span is recorded.
    """

    journal: Journal
    newest_snapshot: Callable[[], Path | None]
    signing_secret: bytes
    pseudonym_secret: bytes
    clock: Clock
    uniform: Callable[[], float]
    monotonic: Callable[[], float] = time.monotonic
    limits: UsageTable | None = None
    context: Callable[[Mapping[bytes, bytes]], TraceContext | None] = context_of
    export: Callable[[InferenceRecord, TraceContext, Sequence[Attempt]], None] | None = None


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
    limits: LimitBook | None


def assemble(
    options: GatewayOptions, outside: Outside, upstream: Upstream, metrics: Metrics, worker: bytes
) -> Parts:
    """Make the parts; UsageError for a secret that is too short."""
    fleet = Fleet(options)
    limits = LimitBook(outside.limits, outside.clock) if outside.limits else None

    def obey(snapshot: Snapshot) -> None:
        if limits is not None:
            limits.obey(_with_mirrors(snapshot))
        fleet.obey(snapshot)

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
            changed=obey,
            refused=lambda why: metrics.refused_snapshots.labels(why).inc(),
        ),
        tickets=TicketOffice(outside.signing_secret, worker=worker),
        pseudonyms=Pseudonyms(outside.pseudonym_secret),
        memory=BodyMemory(options.max_buffered),
        limits=limits,
    )


def mirror_plan(plan: Plan) -> Plan:
    """What bounds a plan's copies: a plan of their own, which nobody can call."""
    budget = plan.mirror.budget_per_day if plan.mirror else None
    return structs.replace(plan, name=f"{plan.name} mirror", limits=Limits(budget_per_day=budget))


def _with_mirrors(snapshot: Snapshot) -> Snapshot:
    mirrors = map(mirror_plan, (plan for plan in snapshot.plans.values() if plan.mirror))
    return structs.replace(snapshot, plans=snapshot.plans | {plan.name: plan for plan in mirrors})
