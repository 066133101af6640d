"""One Delta table, as its only writer sees it."""

# deltalake and arro3 type their arguments with bare generics.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import duckdb
from arro3.core import RecordBatch
from deltalake import (
    ColumnProperties,
    CommitProperties,
    DeltaTable,
    Field,
    Schema,
    Transaction,
    WriterProperties,
    write_deltalake,
)
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.schema import PrimitiveType

from shipworthy.domain.erasure import Tombstone
from shipworthy.errors import Unavailable
from shipworthy.stores.lake.folding import folded
from shipworthy.stores.lake.inventory import literal_glob
from shipworthy.stores.lake.lasting import sync_commits
from shipworthy.stores.lake.schema import FEEDBACK, INFERENCES, MINUTES, MIRRORS, Table

TARGET_BYTES = 128 * 1024 * 1024
"""Size of file that compaction aims at."""

_EPOCH = date(1970, 1, 1)
_ROW_GROUP = 131_072
_STATISTICS = "delta.dataSkippingStatsColumns"
_PROPERTIES = {
    "delta.checkpointInterval": "50",
    "delta.logRetentionDuration": "interval 1 hours",
    "delta.deletedFileRetentionDuration": "interval 1 hours",
    "delta.enableExpiredLogCleanup": "true",
}
_UNNAMABLE = re.compile(r"[\[\]^|\\\x00-\x1f\x7f]|%[0-9A-Fa-f]{2}")
"""What delta-rs ends the process for, or takes for the path of another folder."""
_ABOUT = {INFERENCES: "time", FEEDBACK: "asked", MIRRORS: "asked"}
"""The tables that know of units, and the column with the time of the request in question."""


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """How many files of a day could be merged, and their bytes; no day in a table without."""

    day: date | None
    count: int
    size: int


class LakeTable:
    """A table of the lake, open for writing. Whoever has one holds the lake's lock.

    Every method raises Unavailable when it can't be done; the object is of no use then, since the
    table may have changed or not: open it anew.
    """

    def __init__(self, lake: Path, table: Table) -> None:
        """Open the table, made when there is none, and given what columns it lacks."""
        self.table = table
        self._place = lake / table.name
        self._versions_before: list[tuple[float, int]] = []  # before files were replaced, and when
        with self._explained():
            self._delta = self._open()
            with self._lasting():
                self._adapt()
        known = {column.name for column in table.columns}
        self._has_more = any(field.name not in known for field in self._delta.schema().fields)
        self._writing = _writer_properties(table)

    def written(self, writer: str) -> int | None:
        """The newest transaction of that writer that this table has."""
        with self._explained():
            return self._delta.transaction_version(writer)

    def append(self, rows: RecordBatch, writer: str, number: int) -> None:
        """Commit rows as the writer's transaction of that number, on the disk."""
        with self._explained(), self._lasting():
            write_deltalake(
                self._delta,
                rows,
                mode="append",
                schema_mode="merge" if self._has_more else None,
                writer_properties=self._writing,
                commit_properties=_committing(Transaction(writer, number)),
            )

    # --- upkeep -------------------------------------------------------------------------------

    def small_files(self) -> list[SmallFiles]:
        """What could be merged, by day."""
        with self._explained():
            files = self._delta.get_add_actions(flatten=True)
        sizes = cast("list[int]", files["size_bytes"].to_pylist())
        days: list[Any] = [None] * len(sizes)
        if self.table.by_day:
            days = list(cast("Iterable[Any]", files["partition.day"].to_pylist()))
        small: dict[date | None, list[int]] = {}
        for day, size in zip(days, sizes, strict=True):
            if size < TARGET_BYTES // 2:
                small.setdefault(day, []).append(size)
        return [SmallFiles(day, len(found), sum(found)) for day, found in small.items()]

    def compact(self, day: date | None, now: float) -> None:
        """Merge a day's small files; of `minutes` also the rows that count the same things."""
        if self.table == MINUTES and day is not None and not self._has_more:
            self._fold(day, now)
            return
        with self._explained(), self._replacing(now):
            self._delta.optimize.compact(
                partition_filters=None if day is None else [("day", "=", day.isoformat())],
                target_size=TARGET_BYTES,
                max_concurrent_tasks=1,
                writer_properties=self._writing,
                commit_properties=_committing(),
            )

    def _fold(self, day: date, now: float) -> None:
        chosen = f"day = '{day.isoformat()}'"
        with (
            self._explained(),
            self._replacing(now),
            folded(self._files_of(day), day) as rows,
        ):
            write_deltalake(
                self._delta,
                rows,
                mode="overwrite",
                predicate=chosen,
                target_file_size=TARGET_BYTES,
                writer_properties=self._writing,
                commit_properties=_committing(),
            )

    def _files_of(self, day: date) -> list[str]:
        files = self._delta.get_add_actions(flatten=True)
        paths = cast("list[str]", files["path"].to_pylist())
        days = cast("list[date]", files["partition.day"].to_pylist())
        # The log spells paths as URLs do.
        return [
            literal_glob(str(self._place.absolute() / unquote(path)))
            for path, of in zip(paths, days, strict=True)
            if of == day
        ]

    def drop_before(self, day: date, now: float) -> bool:
        """Drop the days before that one; whether there were any."""
        if not self.table.by_day:
            return False
        with self._explained(), self._replacing(now):
            if not any(date.fromisoformat(each["day"]) < day for each in self._delta.partitions()):
                return False
            self._delta.delete(
                f"day < '{day.isoformat()}'",
                writer_properties=self._writing,
                commit_properties=_committing(),
            )
            return True

    def days_with(self, tombstones: Sequence[Tombstone]) -> list[date]:
        """The days on which something was recorded of these units that is to be forgotten."""
        about = _ABOUT.get(self.table)
        if about is None:
            return []
        with self._explained():
            scanned = self._delta.scan(["day"], _forgotten(tombstones, about))
            try:
                found = scanned.read_all()
            except Exception as error:  # arro3 has no narrower one
                raise OSError(str(error)) from error
        return sorted(set(cast("Iterable[date]", found["day"].to_pylist())))

    def forget(self, tombstones: Sequence[Tombstone], day: date, now: float) -> None:
        """Delete what was recorded of these units on a day, until they were forgotten."""
        predicate = _forgotten(tombstones, _ABOUT[self.table])
        with self._explained(), self._replacing(now):
            self._delta.delete(
                f"day = '{day.isoformat()}' AND ({predicate})",
                writer_properties=self._writing,
                commit_properties=_committing(),
            )

    def sweep(self) -> None:
        """Remove what no version of the last hour refers to."""
        with self._explained(), self._lasting():
            self._delta.vacuum(dry_run=False, full=True, commit_properties=_committing())

    def purge(self, now: float, grace: float) -> bool:
        """Remove at once what is not referred to, but for what somebody may read still.

        That is what was replaced within the last `grace` seconds by this object; whether there was
        none.
        """
        recent = [number for at, number in self._versions_before if now - grace < at <= now]
        with self._explained(), self._lasting():
            self._delta.vacuum(
                0,
                dry_run=False,
                enforce_retention_duration=False,
                full=True,
                keep_versions=recent or None,
                commit_properties=_committing(),
            )
        self._versions_before = self._versions_before[len(self._versions_before) - len(recent) :]
        return not recent

    @contextmanager
    def _replacing(self, now: float) -> Generator[None]:
        before = self._delta.version()
        with self._lasting():
            yield
        if self._delta.version() != before:
            self._versions_before.append((now, before))

    @contextmanager
    def _lasting(self) -> Generator[None]:
        """Have on the disk what is committed meanwhile."""
        before = self._delta.version()
        yield
        sync_commits(self._place, before + 1, self._delta.version())

    # --- opening ------------------------------------------------------------------------------

    def _open(self) -> DeltaTable:
        if _UNNAMABLE.search(str(self._place.absolute())):
            message = (
                f"the lake can't lie in {self._place.parent}: its path has one of [ ] ^ | \\, a"
                " control character or % before two digits; move the project, or set lake.url"
            )
            raise Unavailable(message)
        if DeltaTable.is_deltatable(str(self._place)):
            return DeltaTable(self._place)
        fields = [Field(each.name, PrimitiveType(each.type)) for each in self.table.columns]
        made = DeltaTable.create(
            self._place,
            Schema(fields),
            mode="ignore",
            partition_by=["day"] if self.table.by_day else None,
            configuration={**_PROPERTIES, _STATISTICS: ",".join(_counted(self.table))},
        )
        sync_commits(self._place, 0, made.version())
        return made

    def _adapt(self) -> None:
        """Bring a table that an earlier version made up to this one."""
        types = {
            field.name: getattr(field.type, "type", "nested")
            for field in self._delta.schema().fields
        }
        days = ["day"] if self.table.by_day else []
        if types and self._delta.metadata().partition_columns != days:
            raise self._unlike(f"is not partitioned by {days or 'nothing'}")
        for column in self.table.columns:
            found = types.get(column.name, column.type)
            if found != column.type:
                raise self._unlike(f"has a column {column.name} of {found}, not {column.type}")
        lacking = [each for each in self.table.columns if each.name not in types]
        if lacking:
            fields = [Field(each.name, PrimitiveType(each.type)) for each in lacking]
            self._delta.alter.add_columns(fields, commit_properties=_committing())
        self._keep_personal_out()

    def _keep_personal_out(self) -> None:
        """Have the log keep statistics of what it may, and of what a newer version says it may."""
        found = self._delta.metadata().configuration.get(_STATISTICS)
        personal = {column.name for column in self.table.columns} - set(self.table.plain)
        kept = [name for name in (found or "").split(",") if name and name not in personal]
        counted = [*kept, *(name for name in _counted(self.table) if name not in kept)]
        if ",".join(counted) != found:
            self._delta.alter.set_table_properties(
                {_STATISTICS: ",".join(counted)}, commit_properties=_committing()
            )

    def _unlike(self, what: str) -> Unavailable:
        return Unavailable(
            f"the table {self._place} {what}: something else made it; move it away, and what it"
            " holds with it"
        )

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except CommitFailedError as error:
            message = (
                f"something else changed {self._place} ({_first_line(error)}); only the lake's"
                " writer may, so stop the other one"
            )
            raise Unavailable(message) from error
        except (DeltaError, OSError, duckdb.Error) as error:
            message = (
                f"the table {self._place} can't be used ({_first_line(error)}); {_cure(error)}"
            )
            raise Unavailable(message) from error


def lake_has_tables(lake: Path) -> bool:
    """Whether anything was ever written there."""
    return any(lake.glob("*/_delta_log/*"))


def day_of(time: float) -> date:
    """The UTC day of a Unix time."""
    return _EPOCH + timedelta(seconds=time)


def _committing(*transactions: Transaction) -> CommitProperties:
    # Whoever loses a race must look at the transactions again before it retries.
    return CommitProperties(app_transactions=list(transactions), max_commit_retries=0)


def _counted(table: Table) -> list[str]:
    return [name for name in table.plain if name != "day"]


def _writer_properties(table: Table) -> WriterProperties:
    """Only columns that are known not to be personal get dictionaries and statistics."""
    plain = ColumnProperties(dictionary_enabled=True, statistics_enabled="CHUNK")
    return WriterProperties(
        compression="ZSTD",
        compression_level=1,
        max_row_group_size=_ROW_GROUP,
        default_column_properties=ColumnProperties(
            dictionary_enabled=False, statistics_enabled="NONE"
        ),
        column_properties=dict.fromkeys(_counted(table), plain),
    )


def _forgotten(tombstones: Iterable[Tombstone], about: str) -> str:
    """What is to be deleted, said so that the log, which keeps this, doesn't name the units."""
    return " OR ".join(
        f"(sha256(unit) = X'{hashlib.sha256(each.unit.encode()).hexdigest()}'"
        f" AND ({about} IS NULL OR {about} <= '{_moment(each.at)}'))"
        for each in tombstones
    )


def _moment(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="microseconds")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _cure(error: Exception) -> str:
    if "No space left" in str(error) or "os error 28" in str(error):
        return "make room on its disk"
    return "check its permissions and its disk, or restore it from a backup"
