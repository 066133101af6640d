"""How a running project does, asked from outside: its gateway's doors and numbers."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping

from shipworthy.app.children import ChildState, Processes
from shipworthy.app.gateway_address import gateway_address
from shipworthy.app.lake_writing import read_condition
from shipworthy.errors import Unavailable
from shipworthy.settings import Project

_DROPPED = re.compile(
    r'^shipworthy_gateway_records_dropped_total\{why="([^"]*)"\} (\S+)$', re.MULTILINE
)
_LAST_DROP = re.compile(r"^shipworthy_gateway_last_drop_timestamp_seconds (\S+)$", re.MULTILINE)
LAG_LIMIT = 60.0
"""Seconds that the lake may be behind before somebody should know."""
_PATIENCE = 2.0
_MANY_RESTARTS = 3
_RECENTLY = 300.0


def ask_gateway(project: Project, path: str) -> tuple[int, str]:
    """Status and text of what the gateway answers at a door that needs no key.

    Not through any proxy of the environment. Raises Unavailable when it does not answer.
    """
    address = gateway_address(project)
    connection = http.client.HTTPConnection(address.reachable, address.port, timeout=_PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        message = (
            f"the gateway at {address.url} does not answer ({error or type(error).__name__});"
            f" see {project.logs / 'gateway.log'}"
        )
        raise Unavailable(message) from error
    finally:
        connection.close()


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
        if child.restarts >= _MANY_RESTARTS and now - child.problem_at < _RECENTLY
    ]


def lake_lag(project: Project, now: float) -> float | None:
    """Seconds that the lake is behind; None where its writer has never run."""
    condition = read_condition(project)
    return None if condition is None else now - condition.complete


def counted(counts: Mapping[str, int]) -> str:
    """`5 records (disk 3, full 2)`."""
    reasons = ", ".join(f"{why} {count:,}" for why, count in sorted(counts.items()))
    return f"{sum(counts.values()):,} records ({reasons})"


def megabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
