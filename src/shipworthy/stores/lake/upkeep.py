"""Keeping the lake quick to read and no larger than it must be, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date

from shipworthy.stores.lake.schema import Table
from shipworthy.stores.lake.tables import TARGET_BYTES, LakeTable, SmallFiles, day_of

SWEEP_SECONDS = 3_600.0
_LOOK_AFTER = 16  # commits to a table, before its files are looked at
_MANY_TODAY = 32  # small files of the day that is being written
_MANY_BEFORE = 2  # of a day that is over
_NEVER = float("-inf")


@dataclass(slots=True)
class _Due:
    """What a table needs."""

    commits: int = _LOOK_AFTER
    days: tuple[date | None, ...] = ()


class Upkeep:
    """Compacts, drops days older than `keep` seconds, and removes what nothing refers to."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._due: dict[str, _Due] = {}
        self._today = date.min
        self._swept = _NEVER

    def appended(self, table: Table) -> None:
        """Take note of a commit."""
        self._due.setdefault(table.name, _Due()).commits += 1

    def step(self, tables: Mapping[Table, LakeTable], now: float) -> bool:
        """Do one piece of work, if any is due; whether it did."""
        today = day_of(now)
        if today != self._today:
            self._today = today
            self._due.clear()
            oldest = day_of(max(0.0, now - self._keep))
            dropped = [table.drop_before(oldest, now) for table in tables.values()]
            if any(dropped):
                return True
        if any(self._compact(table, now) for table in tables.values()):
            return True
        if self._swept <= now < self._swept + SWEEP_SECONDS:
            return False
        self._swept = now
        for table in tables.values():
            table.sweep()
        return True

    def _compact(self, table: LakeTable, now: float) -> bool:
        """Merge the small files of one day, if there are any worth it; whether it did."""
        due = self._due.setdefault(table.table.name, _Due())
        if not due.days and due.commits >= _LOOK_AFTER:
            due.commits = 0
            due.days = worth_merging(table.small_files(), self._today)
        if not due.days:
            return False
        day, *rest = due.days
        due.days = tuple(rest)  # before it is tried: what fails must not be tried for ever
        table.compact(day, now)
        return True


def worth_merging(found: Iterable[SmallFiles], today: date) -> tuple[date | None, ...]:
    """The days, those with most small files first, whose files should be merged now."""
    return tuple(
        each.day
        for each in sorted(found, key=lambda each: -each.count)
        if each.count >= (_MANY_TODAY if each.day is None or each.day >= today else _MANY_BEFORE)
        or (each.count > 1 and each.size >= TARGET_BYTES)
    )
