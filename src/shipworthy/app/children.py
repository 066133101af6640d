"""What `shipworthy up` knows about its children, kept in a file for `status` and `doctor`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shipworthy import __version__
from shipworthy.settings import Project

PROCESSES_FILE = "processes.json"
"""In the state folder; it is there while an `up` runs, or after one that was killed."""


class ChildState(msgspec.Struct, frozen=True, kw_only=True):
    """One child: `keeper`, `standby`, `lake writer` or `gateway`.

    `since` is the Unix time of its start or, while `pid` is None, of its end. `problem` is the last
    one in one sentence, from `problem_at` on; empty when it never had one.
    """

    name: str
    pid: int | None
    since: float
    log: str
    restarts: int = 0
    problem: str = ""
    problem_at: float = 0.0


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """All children of the `up` with this `pid`, which began at `since` and is of this `version`."""

    pid: int
    since: float
    children: tuple[ChildState, ...]
    version: str = __version__


def processes_file(project: Project) -> Path:
    """Where `up` tells about its children."""
    return project.state / PROCESSES_FILE


def read_processes(project: Project) -> Processes | None:
    """What the `up` that holds the project, or the one before, told last; None if nothing."""
    try:
        return msgspec.json.decode(processes_file(project).read_bytes(), type=Processes)
    except (OSError, msgspec.MsgspecError):
        return None
