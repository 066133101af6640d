"""The lake's writer: journals in, Delta tables out, exactly once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from shipworthy.domain.records import FeedbackRecord, InferenceRecord, Record
from shipworthy.stores.journal import JournalReader, JournalWriter
from shipworthy.stores.lake.writer import Files, LakeWriter
from shipworthy.stores.ledger import SqlLedger, open_ledger

Make = Callable[..., InferenceRecord]
"""Of `record`: makes the inference of that number."""
NOW = 1_790_000_000.0
DAY = 86_400.0


class Lake:
    """A lake in a folder, its journals and its writer, as any of them is killed and made anew."""

    def __init__(self, folder: Path, ledger: SqlLedger) -> None:
        self.folder, self.ledger, self.now = folder / "lake", ledger, NOW
        self.journals = folder / "journals"
        self.files = Files(
            lake=self.folder,
            place=self.folder / "writer.json",
            condition=folder / "condition.json",
            lock=folder / "lock",
        )
        self.worker = JournalWriter(self.journals, "w0", 10**9, segment_bytes=20_000)
        self.writer = self.restart()

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

    def drain(self) -> None:
        while self.writer.cycle():
            pass

    def rows(self, table: str, columns: str = "*") -> list[tuple]:
        return query(self.folder, f"SELECT {columns} FROM {table} ORDER BY ALL")

    def append(self, *records: Record) -> None:
        assert all(self.worker.append(each) for each in records)


def query(folder: Path, sql: str) -> list[tuple]:
    import duckdb
    from deltalake import DeltaTable

    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        for log in folder.glob("*/_delta_log"):
            table = DeltaTable(log.parent)
            files = [uri.removeprefix("file://") for uri in table.file_uris()]
            if files:
                database.execute(
                    f"CREATE VIEW {log.parent.name} AS SELECT * FROM"
                    f" read_parquet({files}, hive_partitioning = true, union_by_name = true)"
                )
        return database.sql(sql).fetchall()


def inference(number: int, **fields) -> InferenceRecord:
    return InferenceRecord(
        **{
            "id": f"i{number}",
            "at": NOW + number,
            "plan": "digits",
            "model": "digits",
            "revision": 1,
            "key": "key_1",
            "assigned": "stable",
            "probability": 1.0,
            "outcome": "success",
            "status": 200,
            "release": "digits@1",
            "seconds": 0.01,
        }
        | fields
    )


def feedback(number: int, **fields) -> FeedbackRecord:
    return FeedbackRecord(
        **{
            "id": f"f{number}",
            "at": NOW + number,
            "inference": f"i{number}",
            "key": "key_1",
            "kind": "rating",
            "name": "stars",
            "value": 4,
        }
        | fields
    )


@pytest.fixture
def lake(tmp_path: Path, empty_sqlite: Path) -> Generator[Lake]:
    shutil.copyfile(empty_sqlite, tmp_path / "ledger.db")
    with open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}", timeout=0.3) as ledger:
        yield Lake(tmp_path, ledger)


def test_records_are_moved(lake: Lake):
    lake.append(inference(1), feedback(1), inference(2, slices={"country": "DE"}))
    lake.drain()
    assert lake.rows("inferences", "id, slices") == [("i1", None), ("i2", '{"country":"DE"}')]
    assert lake.rows("feedback", "id, inference, value, number") == [("f1", "i1", "4.0", 4.0)]
    assert lake.rows("minutes", "slice, sum(requests) OVER (PARTITION BY slice)") != []
