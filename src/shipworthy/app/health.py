"""How a running project does, asked from outside: its gateway's doors and numbers."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator, Mapping
from contextlib import closing

from shipworthy.app.children import ChildState, Processes, read_processes
from shipworthy.app.gateway_address import gateway_address
from shipworthy.app.place import elsewhere
from shipworthy.domain.terms import Term
from shipworthy.errors import Unavailable
from shipworthy.settings import Project
from shipworthy.stores.lake.state import load_condition

_DROPPED = re.compile(
    r'^shipworthy_gateway_records_dropped_total\{why="([^"]*)"\} (\S+)$', re.MULTILINE
)
_LAST_DROP = re.compile(r"^shipworthy_gateway_last_drop_timestamp_seconds (\S+)$", re.MULTILINE)
LAG_LIMIT = 60.0
"""Seconds that the lake may be behind before somebody should know."""
_PATIENCE = 2.0
_MANY_RESTARTS = 3
RECENTLY = 300.0
LAPSE = 5.0
"""Seconds that nobody may hold the keeper's term: a standby takes over within less."""
STARTING = 30.0
"""Seconds that 'up' may take before what should run must."""
_ASK = "ask 'shipworthy doctor'"


def ask_gateway(project: Project, path: str) -> tuple[int, str]:
    """Status and text of what the gateway answers at a door that needs no key.

    Not through any proxy of the environment. Raises Unavailable when it does not answer.
    """
    address = gateway_address(project)
    try:
        with closing(address.connection(_PATIENCE)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        message = (
            f"the gateway at {address.url} does not answer ({error or type(error).__name__});"
            f" see {project.logs / 'worker-0.log'}"
        )
        raise Unavailable(message) from error


def dropped_records(metrics: str) -> dict[str, int]:
    """How many records the gateway has dropped since it began, by reason, from its `/metrics`."""
    counts = {why: int(float(count)) for why, count in _DROPPED.findall(metrics)}
    return {why: count for why, count in counts.items() if count}


def last_drop(metrics: str) -> float:
    """When the gateway last dropped a record; 0 for never."""
    found = _LAST_DROP.search(metrics)
    return float(found[1]) if found else 0.0


def restarted_often(processes: Processes, now: float) -> list[ChildState]:
    """Children that die again and again: one restart may happen to anybody."""
    return [
        child
        for child in processes.children
        if child.restarts >= _MANY_RESTARTS and now - child.problem_at < RECENTLY
    ]


def lake_lag(project: Project, now: float) -> float | None:
    """Seconds that the lake is behind; None where its writer has never run."""
    condition = load_condition(project.lake_condition)
    return None if condition is None else now - condition.complete


def troubles(project: Project, term: Term, now: float, up_for: float) -> list[str]:
    """What a person should know first of a project that has run for `up_for` seconds."""
    return [
        *_dropping(project, now, up_for),
        *_lagging(project, now),
        *_decided_elsewhere(project, term, now),
        *_undecided(term, now, up_for),
        *_dying(project, now),
    ]


def _dropping(project: Project, now: float, up_for: float) -> Iterator[str]:
    try:
        _, metrics = ask_gateway(project, "/metrics")
    except Unavailable:
        if up_for > STARTING:
            yield f"the gateway does not answer; {_ASK}"
        return
    if now - last_drop(metrics) < RECENTLY:
        counts = counted(dropped_records(metrics))
        yield f"records are being dropped: {counts} since the gateway began; {_ASK}"


def _lagging(project: Project, now: float) -> Iterator[str]:
    lag = lake_lag(project, now)
    if lag is not None and lag > LAG_LIMIT:
        yield f"the lake is {lag:.0f} s behind; {_ASK}"


def _decided_elsewhere(project: Project, term: Term, now: float) -> Iterator[str]:
    if problem := elsewhere(project, term, now):
        yield problem


def _undecided(term: Term, now: float, up_for: float) -> Iterator[str]:
    if now - term.until > LAPSE and up_for > STARTING:
        yield f"no keeper decides, so no rollout moves; {_ASK}"


def _dying(project: Project, now: float) -> Iterator[str]:
    processes = read_processes(project)
    for child in restarted_often(processes, now) if processes else ():
        yield f"the {child.name} was restarted {child.restarts} times: {child.problem}"


def counted(counts: Mapping[str, int]) -> str:
    """`5 records (disk 3, full 2)`."""
    reasons = ", ".join(f"{why} {count:,}" for why, count in sorted(counts.items()))
    return f"{sum(counts.values()):,} records ({reasons})"


def megabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
