"""A lake in a folder, with journals and a ledger of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from deltalake import DeltaTable

from shipworthy.domain.erasure import Tombstone
from shipworthy.domain.lifecycle import Decision
from shipworthy.domain.records import FeedbackRecord, InferenceRecord, MirrorRecord, Outcome, Record
from shipworthy.stores.journal import JournalReader, JournalWriter
from shipworthy.stores.lake.state import Condition, load_condition
from shipworthy.stores.lake.writer import Files, LakeWriter
from shipworthy.stores.ledger import SqlLedger, open_ledger

NOW = 1_790_000_000.0
DAY = 86_400.0


class Lake:
    """A lake, and what its writer lives on. Time stands still at `now`."""

    def __init__(self, folder: Path, ledger: SqlLedger) -> None:
        self.folder, self.ledger, self.now = folder / "lake", ledger, NOW
        self.journals = folder / "journals"
        self.files = Files(
            lake=self.folder,
            place=self.folder / "writer.json",
            condition=folder / "condition.json",
            lock=folder / "lock",
        )
        self.worker = JournalWriter(self.journals, "w0", 10**9, segment_bytes=5_000)
        self.writer = self.restart()

    def lie_in(self, name: str) -> None:
        """Begin anew in another folder."""
        self.folder = self.folder.parent / name / "lake"
        self.files = replace(self.files, lake=self.folder, place=self.folder / "writer.json")
        self.restart()

    def restart(self, **options: int) -> LakeWriter:
        self.writer = LakeWriter(
            files=self.files,
            journal=JournalReader(self.journals),
            ledger=self.ledger,
            clock=lambda: self.now,
            new_slot=lambda: "slot",
            keep=365 * DAY,
            **options,
        )
        return self.writer

    def append(self, *records: Record) -> None:
        assert all(self.worker.append(each) for each in records)

    def drain(self) -> None:
        """Let the writer work until there is nothing left to do now."""
        while self.writer.cycle():
            pass

    def move(self, *records: Record) -> None:
        self.append(*records)
        self.drain()

    def keeper_read_all(self) -> None:
        _, cursors = JournalReader(self.journals).read({}, 10**6)
        with self.ledger.write() as tx:
            tx.cursors.save(cursors)

    def decide(self, *names: str) -> None:
        with self.ledger.write() as tx:
            for name in names:
                tx.decisions.add(Decision(id=name, at=NOW, model="digits", kind="step", text="so"))

    def forget(self, unit: str, at: float) -> None:
        with self.ledger.write() as tx:
            tx.tombstones.add(Tombstone(unit=unit, at=at, by="somebody"))

    @property
    def condition(self) -> Condition:
        found = load_condition(self.files.condition)
        assert found is not None
        return found

    def table(self, name: str) -> DeltaTable:
        return DeltaTable(self.folder / name)

    def ids(self, table: str) -> list[str]:
        return [row[0] for row in self.query(f"SELECT id FROM {table} ORDER BY id")]

    def query(self, sql: str) -> list[tuple]:
        """Ask over the newest version of the tables that have rows."""
        with duckdb.connect() as database:
            database.execute("SET TimeZone = 'UTC'")
            for log in self.folder.glob("*/_delta_log"):
                files = DeltaTable(log.parent).file_uris()
                if files:
                    database.execute(
                        f"CREATE VIEW {log.parent.name} AS SELECT * FROM"
                        f" read_parquet({files}, hive_partitioning = true, union_by_name = true)"
                    )
            return database.sql(sql).fetchall()

    def parquet(self) -> list[Path]:
        """All files with rows that there are, referred to or not."""
        return [path for path in self.folder.rglob("*.parquet") if "_delta_log" not in path.parts]


def make_inference(number: int, **fields) -> InferenceRecord:
    values: dict[str, Any] = {
        "id": f"i{number:05d}",
        "at": NOW + number / 1000,
        "plan": "digits",
        "model": "digits",
        "revision": 1,
        "key": "key_1",
        "assigned": "stable",
        "probability": 1.0,
        "outcome": Outcome.SUCCESS,
        "status": 200,
        "release": "digits@1",
        "seconds": 0.01,
    } | fields
    return InferenceRecord(**values)


def make_feedback(number: int, **fields) -> FeedbackRecord:
    values: dict[str, Any] = {
        "id": f"f{number:05d}",
        "at": NOW + number / 1000,
        "inference": f"i{number:05d}",
        "key": "key_1",
        "kind": "rating",
        "name": "stars",
        "value": 4,
    } | fields
    return FeedbackRecord(**values)


def make_mirror(number: int, **fields) -> MirrorRecord:
    values: dict[str, Any] = {
        "id": f"m{number:05d}",
        "at": NOW + number / 1000,
        "inference": f"i{number:05d}",
        "plan": "digits",
        "model": "digits",
        "release": "digits@2",
        "outcome": Outcome.SUCCESS,
        "seconds": 0.02,
    } | fields
    return MirrorRecord(**values)


@pytest.fixture
def mirror() -> Callable[..., MirrorRecord]:
    return make_mirror


@pytest.fixture
def inference() -> Callable[..., InferenceRecord]:
    return make_inference


@pytest.fixture
def feedback() -> Callable[..., FeedbackRecord]:
    return make_feedback


@pytest.fixture
def lake(tmp_path: Path, empty_sqlite: Path) -> Generator[Lake]:
    shutil.copyfile(empty_sqlite, tmp_path / "ledger.db")
    with open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}", timeout=0.3) as ledger:
        yield Lake(tmp_path, ledger)
