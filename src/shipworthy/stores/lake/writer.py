"""The lake's one writer: from the journals and the ledger into Delta tables, exactly once.

Records go in numbered batches. Before anything of a batch is written, its number and the cursors
that it lies between are on the disk; each table takes its rows together with that number, or
neither. A writer that is killed anywhere goes on with the same batch: journals don't change, so the
same records are read again, and only tables that lack the number are written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
from arro3.core import RecordBatch

from shipworthy.domain.erasure import Tombstone, is_forgotten
from shipworthy.domain.lifecycle import Decision
from shipworthy.domain.records import Record
from shipworthy.errors import IntegrityError, LedgerUnavailable, ShipworthyError, Unavailable
from shipworthy.ports import Clock, Ledger
from shipworthy.stores.files import locked, replace_file
from shipworthy.stores.journal import JournalReader
from shipworthy.stores.lake import schema
from shipworthy.stores.lake.rows import Unfit, decision_rows, rows_of, split_unfit
from shipworthy.stores.lake.state import Condition, Place, load_condition, load_place, save_place
from shipworthy.stores.lake.tables import LakeTable, lake_has_tables
from shipworthy.stores.lake.upkeep import Upkeep

log = logging.getLogger(__name__)

BATCH_RECORDS = 20_000
BATCH_BYTES = 64 * 1024 * 1024
_LEAST_BATCH_BYTES = 1024 * 1024
READERS_SECONDS = 300.0
"""How long whoever reads a table may need the files that it began with, at most."""
_DECISIONS, _UNITS = 1_000, 100  # at a time
_PUT_OFF = 600.0  # seconds until upkeep that failed is tried again
_BATCHED = (schema.INFERENCES, schema.FEEDBACK, schema.MIRRORS, schema.MINUTES)
DECISIONS_WRITER = "decisions"
"""Whose transactions the table of decisions numbers: by the ledger's sequence."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where the writer finds and keeps things; who holds `lock` may change the lake."""

    lake: Path
    place: Path
    condition: Path
    lock: Path


@dataclass(frozen=True, slots=True)
class _Forgetting:
    """Which units are being forgotten, and where they are still to be deleted."""

    units: list[Tombstone]
    left: list[tuple[schema.Table, date]]


@dataclass(slots=True)
class _Opened:
    """What holds for as long as nobody else changes it."""

    place: Place
    tables: dict[schema.Table, LakeTable]
    forgetting: _Forgetting | None = None


@dataclass(slots=True)
class LakeWriter:
    """Moves records. Call `cycle` often; it does little when nothing happened.

    `new_slot` names a writer that there never was; `keep` is how many seconds records stay.
    """

    files: Files
    journal: JournalReader
    ledger: Ledger
    clock: Clock
    new_slot: Callable[[], str]
    keep: float
    batch_records: int = BATCH_RECORDS
    _opened: _Opened | None = field(init=False, default=None)
    _tombstones: list[Tombstone] | None = field(init=False, default=None)
    _upkeep: Upkeep = field(init=False)
    _upkeep_from: float = field(init=False, default=0.0)
    _upkeep_problem: str = field(init=False, default="")
    _complete: float = field(init=False)
    _committed: float | None = field(init=False, default=None)
    _records: int = field(init=False, default=0)
    _unfit: int = field(init=False, default=0)
    _problem: str = field(init=False, default="")

    def __post_init__(self) -> None:
        before = load_condition(self.files.condition)
        self._complete = before.complete if before else self.clock()
        self._upkeep = Upkeep(self.keep)

    def cycle(self) -> bool:
        """Move one batch, and do a piece of upkeep; whether there is more to be done at once.

        Raises Unavailable and IntegrityError for what keeps it from going on; the records wait in
        the journals then, and the next call tries again.
        """
        self._problem = self._upkeep_problem if self.clock() < self._upkeep_from else ""
        try:
            with locked(self.files.lock):
                return self._cycle()
        except ShipworthyError as error:
            # What memory holds may differ from what was written: begin again from the disk.
            self._opened, self._problem = None, str(error)
            raise
        finally:
            self._tell()

    def _cycle(self) -> bool:
        now = self.clock()
        opened = self._opened
        if opened is None or load_place(self.files.place) != opened.place:
            # Whoever held the lock in between, such as a writer whose 'up' was killed, moved on.
            opened = self._opened = self._open(now)
        cursors, decisions = self._ask_ledger(opened)
        if not opened.place.done:
            self._write(opened, self._journal_between(opened.place))
        more = self._move(opened, now)
        if decisions:
            table = opened.tables[schema.DECISIONS]
            table.append(decision_rows(decisions), DECISIONS_WRITER, decisions[-1][0])
        if cursors is not None:
            self.journal.discard(opened.place.end, cursors)
        if now >= self._upkeep_from:
            more = self._tidy(opened, now) or more
        return more or len(decisions) > _DECISIONS // 2

    # --- opening ------------------------------------------------------------------------------

    def _open(self, now: float) -> _Opened:
        place = load_place(self.files.place) or self._first_place()
        tables = {each: LakeTable(self.files.lake, each) for each in schema.TABLES}
        for table in _BATCHED:
            written = tables[table].written(place.slot) or 0
            if written > place.batch:
                message = (
                    f"the lake's {table.name} have batch {written} and {self.files.place} knows of"
                    f" {place.batch}: one of them is older; restore both from the same backup"
                )
                raise IntegrityError(message)
        if place.purge is not None:
            # Who replaced the files that are to be removed is not known here, so wait in full.
            place = msgspec.structs.replace(place, purge=now + READERS_SECONDS)
            save_place(self.files.place, place)
        return _Opened(place, tables)

    def _first_place(self) -> Place:
        if lake_has_tables(self.files.lake):
            message = (
                f"{self.files.place} is gone, so nobody can tell which records the lake has; put it"
                f" back from a backup, or move {self.files.lake} away to begin a new lake"
            )
            raise IntegrityError(message)
        place = Place(slot=self.new_slot())
        save_place(self.files.place, place)
        return place

    # --- the ledger ---------------------------------------------------------------------------

    def _ask_ledger(
        self, opened: _Opened
    ) -> tuple[dict[str, int] | None, list[tuple[int, Decision]]]:
        """How far the keeper has read, if that can be told, and what was decided since.

        Also learns what was forgotten. With the ledger away, records go on by what was known
        before; but not before anything was.
        """
        known = self._tombstones or []
        newest = opened.tables[schema.DECISIONS].written(DECISIONS_WRITER) or 0
        try:
            with self.ledger.read() as tx:
                known = [*known, *tx.tombstones.after(known[-1].sequence if known else 0)]
                cursors = tx.cursors.load()
                decisions = list(tx.decisions.after(max(0, newest - 1), _DECISIONS))
        except LedgerUnavailable as error:
            if self._tombstones is None:
                raise
            self._problem = f"decisions wait: {error}"
            return None, []
        self._tombstones = known
        if newest and (not decisions or decisions.pop(0)[0] != newest):
            self._problem = (
                f"decisions wait: the lake has number {newest}, which the ledger hasn't; restore"
                " both from the same backup"
            )
            return cursors, []
        return cursors, decisions

    # --- batches ------------------------------------------------------------------------------

    def _journal_between(self, place: Place) -> list[Record]:
        try:
            return self.journal.read_between(place.start, place.end)
        except OSError as error:
            message = f"can't read the journals again ({error}); check their permissions and disk"
            raise Unavailable(message) from error

    def _move(self, opened: _Opened, now: float) -> bool:
        """Move the next batch; whether there may be another one."""
        start = opened.place.end
        room = self._room()
        records, end = self.journal.read(start, self.batch_records, room)
        full = len(records) >= self.batch_records or _bytes_between(start, end) >= room
        if any(behind != start.get(name) for name, behind in end.items()):
            self._save(opened, batch=opened.place.batch + 1, start=start, end=end)
            self._write(opened, records)
        if not full:
            self._complete = now
        elif records:
            self._complete = max(self._complete, min(record.at for record in records))
        return full

    def _room(self) -> int:
        """Bytes that a batch may have: half of what is free on a disk that is nearly full.

        One that does not fit would have to be tried again and again, and no journal be deleted.
        """
        try:
            disk = os.statvfs(self.files.lake)
        except OSError:
            return BATCH_BYTES  # writing will tell what is wrong
        free = disk.f_bavail * disk.f_frsize
        return min(BATCH_BYTES, max(_LEAST_BATCH_BYTES, free // 2))

    def _write(self, opened: _Opened, records: list[Record]) -> None:
        """Write the rows of the batch to the tables that lack it."""
        forgotten: dict[str, float] = {}
        for tombstone in self._tombstones or ():
            forgotten[tombstone.unit] = max(tombstone.at, forgotten.get(tombstone.unit, 0.0))
        kept = [each for each in records if not is_forgotten(each, forgotten)]
        place = opened.place
        for table, rows in self._rows(kept).items():
            if (opened.tables[table].written(place.slot) or 0) < place.batch:
                opened.tables[table].append(rows, place.slot, place.batch)
                self._upkeep.appended(table)
        self._save(opened, start=place.end)
        if records:
            self._records += len(kept)
            self._committed = self.clock()

    def _rows(self, records: list[Record]) -> dict[schema.Table, RecordBatch]:
        try:
            return rows_of(records)
        except Unfit as error:
            fit, unfit = split_unfit(records)
            log.warning("%d records have no place in the lake (%s) and are left out", unfit, error)
            self._unfit += unfit
            return rows_of(fit)

    # --- forgetting, and the rest of upkeep ----------------------------------------------------

    def _tidy(self, opened: _Opened, now: float) -> bool:
        """Do a piece of what need not be done for records to get on; whether there was any."""
        try:
            return self._forget(opened, now) or self._upkeep.step(opened.tables, now)
        except Unavailable as error:
            # A damaged file must not keep new records out.
            self._opened, self._upkeep_from = None, now + _PUT_OFF
            self._problem = self._upkeep_problem = f"the lake's upkeep is put off: {error}"
            log.warning("%s", self._problem)
            return False

    def _forget(self, opened: _Opened, now: float) -> bool:
        """Delete forgotten units, and later the files that they were in; whether it did either."""
        place = opened.place
        pending = [each for each in self._tombstones or () if each.sequence > place.forgotten]
        if pending:
            self._delete(opened, pending, now)
            return True
        if place.purge is None or now < place.purge:
            return False
        gone = [table.purge(now, READERS_SECONDS) for table in opened.tables.values()]
        self._save(opened, purge=None if all(gone) else now + READERS_SECONDS)
        return True

    def _delete(self, opened: _Opened, pending: list[Tombstone], now: float) -> None:
        """Delete units from one day of one table, or take note that they are gone from all."""
        forgetting = opened.forgetting
        if forgetting is None:
            # Whatever is moved from here on is filtered, so nothing comes to further days. Units
            # that are asked for meanwhile have days of their own, and wait.
            units = pending[:_UNITS]
            left = [
                (table, day)
                for table, each in opened.tables.items()
                for day in each.days_with(units)
            ]
            forgetting = opened.forgetting = _Forgetting(units, left)
        if forgetting.left:
            table, day = forgetting.left[0]
            opened.tables[table].forget(forgetting.units, day, now)
            del forgetting.left[0]
            return
        opened.forgetting = None
        purge = opened.place.purge or now + READERS_SECONDS
        self._save(opened, forgotten=forgetting.units[-1].sequence, purge=purge)

    # --- what is remembered -------------------------------------------------------------------

    def _save(self, opened: _Opened, **changes: Any) -> None:
        opened.place = msgspec.structs.replace(opened.place, **changes)
        save_place(self.files.place, opened.place)

    def _tell(self) -> None:
        skipped = dict(self.journal.skipped)
        if self._unfit:
            skipped["unfit"] = self._unfit
        condition = Condition(
            at=self.clock(),
            complete=self._complete,
            committed=self._committed,
            records=self._records,
            skipped=skipped,
            problem=self._problem,
        )
        # Where the disk is full this can't be told either; the fault itself is raised.
        with suppress(Unavailable):
            replace_file(self.files.condition, msgspec.json.encode(condition))


def _bytes_between(start: Mapping[str, int], end: Mapping[str, int]) -> int:
    return sum(behind - start.get(name, 0) for name, behind in end.items())
