"""Asking a running `up` to restart its gateway's workers, one after the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from shipworthy.app.children import Processes, Renewal, read_processes
from shipworthy.app.status import LOCK, is_held
from shipworthy.errors import NotAllowed, Unavailable
from shipworthy.settings import Project

_HEARD_SECONDS = 30.0
_STILL_SECONDS = 300.0  # more than a worker takes to get ready, and the old one by default to end
_LOOK_SECONDS = 0.1


def renew_workers(project: Project, tell: Callable[[Renewal], object]) -> Renewal:
    """Have the workers replaced by new ones, and wait for it; `tell` hears how it goes.

    Raises Unavailable when nothing runs here, or when not all were replaced: those that are left
    serve on. Raises NotAllowed when another account runs it.
    """
    known = _running(project)
    before = known.renewal.number if known.renewal else 0
    try:
        os.kill(known.pid, signal.SIGHUP)
    except PermissionError as error:
        message = f"'shipworthy up' (process {known.pid}) is another account's; ask as that one"
        raise NotAllowed(message) from error
    except ProcessLookupError as error:
        raise _ended() from error
    last, still = Renewal(number=before), time.monotonic() + _HEARD_SECONDS
    while not (last.number > before and not last.running):
        if not is_held(project):
            raise _ended()
        found = read_processes(project)
        told = found.renewal if found and found.renewal else last
        if told.number > before and told != last:
            last, still = told, time.monotonic() + _STILL_SECONDS
            tell(last)
        if time.monotonic() > still:
            message = (
                "'shipworthy up' does not say how it goes; ask 'shipworthy doctor', and see its log"
            )
            raise Unavailable(message)
        time.sleep(_LOOK_SECONDS)
    if last.problem:
        raise Unavailable(f"{last.done} of {last.of} workers were restarted: {last.problem}")
    return last


def _running(project: Project) -> Processes:
    """What the `up` that holds this project says of itself."""
    if not is_held(project):
        message = "nothing is running here; start it with 'shipworthy up'"
        raise Unavailable(message)
    known = read_processes(project)
    if known is None or known.pid != _holder(project):
        message = "'shipworthy up' has only just begun here; try again when it serves"
        raise Unavailable(message)
    if known.renewal is None:
        message = (
            f"'shipworthy up' here is of version {known.version}, which can't restart its workers;"
            " stop it and start it again"
        )
        raise Unavailable(message)
    return known


def _holder(project: Project) -> int:
    """The process that wrote itself into the lock; 0 when it has yet to."""
    try:
        return int((project.state / LOCK).read_text())
    except (OSError, ValueError):
        return 0


def _ended() -> Unavailable:
    return Unavailable("'shipworthy up' ended meanwhile; start it again")
