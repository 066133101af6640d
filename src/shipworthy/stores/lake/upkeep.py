"""Keeping the lake quick to read and no larger than it must be, a piece at a time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

from shipworthy.stores.lake.schema import Table
from shipworthy.stores.lake.tables import LakeTable, day_of

SWEEP_SECONDS = 3_600.0
_LOOK_AFTER = 16  # commits to a table, before its files are looked at
_MANY_TODAY = 32  # small files of the day that is being written
_MANY_BEFORE = 2  # of a day that is over


class Upkeep:
    """Compacts, drops old days, and removes what is no longer referred to."""

    def __init__(self, tables: Mapping[Table, LakeTable], keep: float) -> None:
        self._tables = tables
        self._keep = keep
        self._commits = dict.fromkeys(tables, _LOOK_AFTER)
        self._today = date.min
        self._swept = 0.0

    def appended(self, table: Table) -> None:
        """Take note of a commit."""
        self._commits[table] += 1

    def step(self, now: float) -> bool:
        """Do one piece of work, if any is due; whether it did."""
        today = day_of(now)
        if today != self._today:
            self._today = today
            self._commits = dict.fromkeys(self._tables, _LOOK_AFTER)
            for table in self._tables.values():
                table.drop_before(day_of(max(0.0, now - self._keep)), now)
        for each, table in self._tables.items():
            if self._commits[each] >= _LOOK_AFTER:
                if self._compact(table, today, now):
                    return True
                self._commits[each] = 0
        if not self._swept <= now < self._swept + SWEEP_SECONDS:
            self._swept = now
            for table in self._tables.values():
                table.sweep()
            return True
        return False

    def _compact(self, table: LakeTable, today: date, now: float) -> bool:
        """Merge the small files of the day that has most, if that is worth it."""
        for day, count in table.small_files().most_common():
            if count >= (_MANY_TODAY if day is None or day >= today else _MANY_BEFORE):
                table.compact(day, now)
                return True
        return False
