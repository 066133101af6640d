"""The snapshot file, followed: what the keeper wrote last, for as long as it may be obeyed.

Each keeper's term has a file of its own, and the newest term's is the gateway's only source. One
that is torn, altered or from a keeper whose term is over is refused and the old one stays in force;
a missing one changes nothing. Two things
run out by themselves, by the wall clock and by the monotonic one, so that a clock that jumps back
keeps nothing alive: a candidate's lease, and the keys when the keeper is away for too long.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from pathlib import Path

from shipworthy.domain.plan import Plan, Snapshot, decode_snapshot
from shipworthy.gateway.needs import Clock

_log = logging.getLogger("shipworthy.gateway")

_Identity = tuple[int, int, int]


class SnapshotFollower:
    """Reads the newest term's snapshot file when it changes.

    `newest` finds it: None without one, OSError when it can't be looked for. `changed` is called
    with each snapshot that is obeyed from now on; `refused` with the short reason whenever a file
    is not. `monotonic` counts seconds that no one sets.
    """

    def __init__(
        self,
        newest: Callable[[], Path | None],
        *,
        clock: Clock,
        monotonic: Callable[[], float],
        changed: Callable[[Snapshot], None],
        refused: Callable[[str], None],
    ) -> None:
        self.current: Snapshot | None = None
        self._newest = newest
        self._clock = clock
        self._monotonic = monotonic
        self._changed = changed
        self._refused = refused
        self._seen: _Identity | None = None
        self._leases: dict[str, tuple[float, float]] = {}
        self._keys_until = math.inf
        self._missing = False
        self._trouble = ""

    def poll(self) -> bool:
        """Look once; whether a new snapshot is in force."""
        try:
            path = self._newest()
            if path is None:
                return self._none("nothing was published yet")
            identity = _identity(path)
        except OSError as error:  # it may also have gone just now, with a newer one in its place
            return self._none(str(error))
        self._missing = False
        if identity == self._seen:
            return False
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False  # a newer one has just taken its place
        except OSError as error:
            return self._could_not_read(str(error))
        self._seen, self._trouble = identity, ""
        try:
            snapshot = decode_snapshot(content)
        except ValueError as error:  # msgspec's errors are ValueErrors
            return self._refuse("unreadable", str(error))
        problem = _outdated(snapshot, self.current)
        if problem:
            return self._refuse("outdated", problem)
        return self._obey(snapshot)

    def _obey(self, snapshot: Snapshot) -> bool:
        try:
            self._changed(snapshot)
        except Exception:  # noqa: BLE001  # a bad plan must not end the worker
            _log.exception("putting a snapshot in force failed")
            return self._refuse("unusable", "it can't be put in force")
        self._note_times(snapshot)
        self.current = snapshot
        return True

    async def follow(self, seconds: float) -> None:
        """Poll for ever."""
        while True:
            await asyncio.sleep(seconds)
            self.poll()

    def now_for(self, plan: Plan) -> float:
        """The time by which the plan's lease is judged: infinity once it ran out by any clock."""
        lease = self._leases.get(plan.name)
        if lease is not None and self._monotonic() >= lease[1]:
            return math.inf
        return self._clock()

    def keys_honoured(self) -> bool:
        """Whether the keys of the current snapshot are still young enough."""
        snapshot = self.current
        if snapshot is None or snapshot.max_stale is None:
            return snapshot is not None
        return (
            self._monotonic() < self._keys_until
            and self._clock() < snapshot.written + snapshot.max_stale
        )

    def age(self) -> float:
        """Seconds since the current snapshot was written; infinite without one."""
        return math.inf if self.current is None else self._clock() - self.current.written

    def _none(self, why: str) -> bool:
        """Say so once."""
        if not self._missing:
            _log.warning("no snapshot to obey: %s", why)
        self._missing = True
        return False

    def _could_not_read(self, trouble: str) -> bool:
        """Say so once; the file is read again, as this may pass without its being changed."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._refuse("unreadable", trouble)
        return False

    def _refuse(self, reason: str, problem: str) -> bool:
        _log.error("the newest snapshot is not obeyed: %s", problem)
        self._refused(reason)
        return False

    def _note_times(self, snapshot: Snapshot) -> None:
        """Translate what ends at a wall time to the monotonic clock, never beyond what was meant.

        The same lease read again is not a renewal, so its end stays where it was.
        """
        now, monotonic = self._clock(), self._monotonic()
        leases: dict[str, tuple[float, float]] = {}
        for name, plan in snapshot.plans.items():
            if plan.lease is None:
                continue
            before = self._leases.get(name)
            if before is not None and before[0] == plan.lease:
                leases[name] = before
                continue
            left = min(plan.lease - now, plan.lease - snapshot.written)
            leases[name] = (plan.lease, monotonic + left)
        self._leases = leases
        if self.current is None or self.current.written != snapshot.written:
            stale = math.inf if snapshot.max_stale is None else snapshot.max_stale
            self._keys_until = monotonic + min(stale, snapshot.written + stale - now)


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _outdated(new: Snapshot, obeyed: Snapshot | None) -> str:
    """Why the new snapshot is older than the one in force; empty when it is not."""
    if obeyed is None:
        return ""
    if new.fence < obeyed.fence:
        return f"it is from keeper term {new.fence}; term {obeyed.fence} is obeyed"
    for name, plan in new.plans.items():
        before = obeyed.plans.get(name)
        if before is None:
            continue
        if plan.fence < before.fence:
            return f"plan {name} is from keeper term {plan.fence}; term {before.fence} is obeyed"
        if plan.revision < before.revision:
            return f"plan {name} has revision {plan.revision}; {before.revision} is obeyed"
    return ""
