"""The lake's tables over time: what they keep, what they let go, and how they grow."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pytest
from arro3.core import Table
from deltalake import DeltaTable, Field, Schema, write_deltalake
from deltalake.schema import PrimitiveType

from shipworthy.domain.records import FeedbackRecord, InferenceRecord, MirrorRecord
from shipworthy.errors import Unavailable
from shipworthy.stores.journal import JournalReader, JournalWriter
from shipworthy.stores.lake import schema, upkeep
from shipworthy.stores.lake import writer as module
from shipworthy.stores.lake.tables import TARGET_BYTES, LakeTable, SmallFiles
from shipworthy.stores.lake.upkeep import worth_merging

SAMPLES = Path(__file__).parents[1] / "samples"
Inference = Callable[..., InferenceRecord]
Feedback = Callable[..., FeedbackRecord]
Mirror = Callable[..., MirrorRecord]
Lake = Any
"""Of conftest.py."""
NOW = 1_790_000_000.0
DAY = 86_400.0
PLANTED = {
    "id": "planted-id",
    "unit": "planted-unit",
    "slices": {"planted-slice": "planted-value"},
    "traceparent": "planted-trace",
    "request": b"planted-request",
    "response": b"planted-response",
    "features": {"planted-feature": "planted-word"},
    "request_digest": "planted-digest",
    "response_digest": "planted-digest",
}
PLANTED_FEEDBACK = {
    "inference": "planted-id",
    "unit": "planted-unit",
    "value": "planted-opinion",
}
PLANTED_MIRROR = {
    "id": "planted-copy",
    "inference": "planted-id",
    "unit": "planted-unit",
    "difference": "planted-field",
    "response": b"planted-response",
    "response_digest": "planted-digest",
}


def compact_all(lake: Lake) -> None:
    for table in schema.TABLES:
        opened = LakeTable(lake.folder, table)
        for found in opened.small_files():
            opened.compact(found.day, lake.now)


def footers(files: Iterable[Path]) -> list[tuple]:
    with duckdb.connect() as database:
        return database.execute(
            "SELECT path_in_schema, stats_min, stats_max, stats_min_value, stats_max_value,"
            " stats_null_count, stats_distinct_count, dictionary_page_offset, bloom_filter_offset"
            " FROM parquet_metadata(?)",
            [[str(path) for path in files]],
        ).fetchall()


class TestPersonalColumns:
    @pytest.fixture
    def planted(self, lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror) -> Lake:
        for number in range(3):
            lake.move(
                inference(number, **PLANTED),
                inference(number, **(PLANTED | {"unit": "other"})),
                feedback(number, **PLANTED_FEEDBACK),
                feedback(number, **(PLANTED_FEEDBACK | {"value": 987654})),
                mirror(number, **PLANTED_MIRROR),
                mirror(number, **(PLANTED_MIRROR | {"unit": "other"})),
            )
        compact_all(lake)
        lake.restart()
        lake.forget("other", NOW + 1)
        lake.drain()
        lake.move(inference(9, **PLANTED), feedback(9, **PLANTED_FEEDBACK))
        for table in schema.TABLES:
            lake.table(table.name).create_checkpoint()
        return lake

    def test_their_files_keep_no_statistics_of_them(self, planted: Lake):
        personal = {
            column.name
            for table in (schema.INFERENCES, schema.FEEDBACK, schema.MIRRORS)
            for column in table.columns
            if column.personal
        } - {"id"}  # feedback's own says nothing of a unit
        for name, *kept in footers(planted.parquet()):
            if name in personal:
                assert kept == [None] * len(kept), name
        files = list((planted.folder / "inferences").glob("day=*/*"))
        found = {name: kept for name, *kept in footers(files)}
        assert found["id"] == [None] * 8
        assert found["time"][0] is not None
        assert found["release"][-2] is not None  # a dictionary

    def test_the_logs_say_nothing_of_them(self, planted: Lake):
        logs = [
            log
            for table in ("inferences", "feedback", "mirrors")
            for log in (planted.folder / table / "_delta_log").iterdir()
        ]
        said = "".join(log.read_text() for log in logs if log.suffix == ".json")
        assert '"operation":"DELETE"' in said
        assert "digits@1" in said  # statistics of others
        for secret in ("planted", "987654", "other"):
            assert secret not in said
        checkpoints = [str(log) for log in logs if log.suffix == ".parquet"]
        assert checkpoints
        with duckdb.connect() as database:
            kept = database.execute(
                "SELECT * FROM read_parquet(?, union_by_name = true)", [checkpoints]
            )
            assert "planted" not in str(kept.fetchall())


class TestForgetting:
    def units(self, lake: Lake) -> list[tuple]:
        """Of every row in any file that is there, referred to or not."""
        files = [str(path) for path in lake.parquet() if "unit" in columns_of(path)]
        with duckdb.connect() as database:
            return (
                database.execute(
                    "SELECT unit FROM read_parquet(?, union_by_name = true) ORDER BY ALL", [files]
                ).fetchall()
                if files
                else []
            )

    def test_a_unit_leaves_lake_and_journals(
        self, lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
    ):
        for number in range(3):
            lake.move(
                inference(number, unit="gone", at=NOW - number * DAY),
                inference(number + 10, unit="stays"),
                feedback(number, unit="gone", asked_at=NOW - 5),
                feedback(number + 10, unit="gone", asked_at=None),
                feedback(number + 20, unit="stays", asked_at=NOW - 5),
                mirror(number, unit="gone"),
                mirror(number + 10, unit="stays"),
            )
        lake.move(
            inference(20, unit="gone", at=NOW + 60),
            feedback(30, unit="gone", asked_at=NOW + 60),
            mirror(20, unit="gone", at=NOW + 31, seconds=2.0),
            mirror(30, unit="gone", at=NOW + 60, asked_at=NOW + 31),
        )
        lake.worker.close()
        lake.forget("gone", NOW + 30)
        lake.keeper_read_all()
        lake.drain()
        assert lake.query("SELECT id FROM inferences WHERE unit = 'gone'") == [("i00020",)]
        assert lake.query("SELECT id FROM feedback WHERE unit = 'gone'") == [("f00030",)]
        assert lake.query("SELECT id FROM mirrors WHERE unit = 'gone'") == [("m00030",)]
        assert list(lake.journals.iterdir()) == []
        lake.now += module.READERS_SECONDS - 1
        lake.drain()
        assert len([unit for unit in self.units(lake) if unit == ("gone",)]) > 2  # being read
        lake.now += 2
        lake.drain()
        assert self.units(lake) == [("gone",)] * 3 + [("stays",)] * 9

    def test_what_arrives_late_is_left_out(
        self, lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
    ):
        lake.forget("gone", NOW)
        lake.move(
            inference(1, unit="gone", at=NOW - 9),
            inference(2, unit="gone", at=NOW + 9),
            feedback(1, unit="gone", asked_at=NOW - 9, at=NOW + 9),
            feedback(2, unit="gone", asked_at=NOW + 9, at=NOW + 9),
            mirror(1, unit="gone", asked_at=NOW - 9, at=NOW + 9),
            inference(3),
        )
        lake.forget("gone", NOW + 20)
        lake.move(inference(4, unit="gone", at=NOW + 19))
        assert lake.ids("inferences") == ["i00003"]
        assert lake.table("feedback").count() == 0
        assert lake.table("mirrors").count() == 0

    def test_a_restart_in_the_middle_forgets_all(self, lake: Lake, inference: Inference):
        for number in range(4):
            lake.move(inference(number, unit=f"u{number % 2}", at=NOW - number * DAY))
        lake.forget("u0", NOW)
        lake.forget("u1", NOW - 2 * DAY)
        lake.writer.cycle()
        lake.restart()
        lake.drain()
        assert lake.ids("inferences") == ["i00001"]
        lake.restart()
        lake.drain()
        lake.now += module.READERS_SECONDS + 1
        lake.drain()
        assert self.units(lake) == [("u1",)]

    def test_a_unit_that_is_asked_for_meanwhile_is_forgotten_too(
        self, lake: Lake, inference: Inference
    ):
        for number in range(6):
            lake.move(inference(number, unit="a" if number < 3 else "b", at=NOW - number * DAY))
        lake.forget("a", NOW)
        lake.writer.cycle()
        lake.forget("b", NOW)
        lake.drain()
        assert lake.table("inferences").count() == 0

    def test_after_a_restart_files_go_in_time(self, lake: Lake, inference: Inference):
        lake.move(inference(1, unit="gone"))
        lake.forget("gone", NOW + 1)
        lake.drain()
        lake.now += 10
        lake.restart()
        for _ in range(4):
            lake.drain()
            lake.now += module.READERS_SECONDS / 3
        lake.drain()
        assert self.units(lake) == []

    def test_another_unit_later_has_its_own_grace(self, lake: Lake, inference: Inference):
        lake.move(inference(1, unit="a"), inference(2, unit="b"), inference(3, unit="c"))
        lake.forget("a", NOW + 1)
        lake.drain()
        lake.now += module.READERS_SECONDS - 10
        lake.forget("b", NOW + 1)
        lake.drain()
        lake.now += 20
        lake.drain()
        assert set(self.units(lake)) == {("b",), ("c",)}
        lake.now += module.READERS_SECONDS
        lake.drain()
        assert self.units(lake) == [("c",)]

    def test_a_damaged_file_keeps_no_record_out(
        self, lake: Lake, inference: Inference, monkeypatch: pytest.MonkeyPatch
    ):
        lake.move(inference(1, unit="gone", request=bytes(1000)))
        (file,) = (lake.folder / "inferences").glob("day=*/*")
        sound = file.read_bytes()
        file.write_bytes(sound[:100])
        lake.forget("gone", NOW + 1)
        lake.move(inference(2))
        assert "the lake's upkeep is put off" in lake.condition.problem
        lake.move(inference(3))
        assert "the lake's upkeep is put off" in lake.condition.problem
        assert lake.table("inferences").count() == 3
        file.write_bytes(sound)
        lake.now += 601
        lake.drain()
        assert lake.ids("inferences") == ["i00002", "i00003"]
        assert lake.condition.problem == ""


def columns_of(path: Path) -> set[str]:
    with duckdb.connect() as database:
        found = database.execute("SELECT name FROM parquet_schema(?)", [str(path)]).fetchall()
    return {name for (name,) in found}


class TestSpace:
    def test_a_day_that_is_over_is_merged(self, lake: Lake, inference: Inference):
        for number in range(5):
            lake.move(inference(number))
        assert len(lake.table("inferences").file_uris()) == 5
        lake.now += DAY
        lake.drain()
        assert len(lake.table("inferences").file_uris()) == 1
        assert len(lake.ids("inferences")) == 5

    def test_minutes_are_added_up_as_they_are_merged(self, lake: Lake, inference: Inference):
        for number in range(6):
            at = NOW + 60 * (number % 2)
            lake.move(inference(number, at=at, seconds=0.5, slices={"country": "DE"}))
        asked = "SELECT slice, epoch(minute), sum(requests), sum(seconds) FROM minutes GROUP BY ALL"
        before = sorted(lake.query(asked))
        assert lake.query("SELECT count(*) FROM minutes") == [(12,)]
        compact_all(lake)
        assert lake.query("SELECT count(*) FROM minutes") == [(4,)]
        assert sorted(lake.query(asked)) == before
        assert [row[2] for row in before] == [3, 3, 3, 3]
        # Which batches are in the table is still known: nothing is written again.
        assert LakeTable(lake.folder, schema.MINUTES).written("slot") == 6
        lake.restart()
        lake.move(inference(6, at=NOW, seconds=0.5))
        assert lake.query("SELECT sum(requests) FROM minutes WHERE slice = ''") == [(7,)]

    @pytest.mark.parametrize("name", ["a lake", "ünï", "50%", "a*b?", "it's #1", "{a,b}"])
    def test_a_lake_is_merged_wherever_it_lies(self, lake: Lake, inference: Inference, name: str):
        lake.lie_in(name)
        for number in range(5):
            lake.move(inference(number))
        compact_all(lake)
        assert not lake.condition.problem
        for table in ("inferences", "minutes"):
            assert len(list((lake.folder / table / "_delta_log").glob("*.json"))) == 7
            assert len(lake.table(table).file_uris()) == 1

    @pytest.mark.parametrize("name", ["[a]", "a^b", "a|b", "a\\b", "a\nb", "a%20b"])
    def test_a_place_that_files_cannot_be_named_in_is_refused(self, lake: Lake, name: str):
        lake.lie_in(name)
        with pytest.raises(Unavailable, match=r"(?s)can't lie in .*; move the project"):
            lake.writer.cycle()

    def test_minutes_of_a_newer_version_keep_what_we_do_not_know(
        self, lake: Lake, inference: Inference
    ):
        lake.move(inference(1), inference(2))
        table = lake.table("minutes")
        table.alter.add_columns([Field("novel", PrimitiveType("string"))])
        lake.restart()
        lake.move(inference(3))
        compact_all(lake)
        assert lake.query("SELECT sum(requests) FROM minutes") == [(3,)]
        assert len(lake.table("minutes").file_uris()) == 1

    def test_whatever_a_table_refers_to_is_on_the_disk(
        self, lake: Lake, inference: Inference, monkeypatch: pytest.MonkeyPatch
    ):
        synced, sync = set[Path](), os.fsync

        def fsync(descriptor: int) -> None:
            synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        for number in range(60):
            lake.append(inference(number))
            lake.writer.cycle()
        compact_all(lake)
        for table in ("inferences", "minutes"):
            log = lake.folder / table / "_delta_log"
            assert {path for path in log.iterdir() if path.is_file()} <= synced
            files = {Path(file) for file in lake.table(table).file_uris()}
            assert files | {log, *(file.parent for file in files), log.parent} <= synced
            assert any("checkpoint" in path.name for path in synced if path.parent == log)

    def test_today_is_merged_now_and_then(
        self, lake: Lake, inference: Inference, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(upkeep, "_LOOK_AFTER", 2)
        monkeypatch.setattr(upkeep, "_MANY_TODAY", 4)
        for number in range(20):
            lake.move(inference(number))
            assert len(lake.table("inferences").file_uris()) <= 6
        assert len(lake.ids("inferences")) == 20

    def test_what_was_replaced_goes_after_an_hour(self, lake: Lake, inference: Inference):
        for number in range(5):
            lake.move(inference(number))
        stray = lake.folder / "inferences" / "day=2026-09-21" / "part-killed.parquet"
        stray.write_bytes(b"half")
        compact_all(lake)
        lake.restart()
        lake.drain()
        assert len(list((lake.folder / "inferences").glob("day=*/*"))) > 5
        opened = LakeTable(lake.folder, schema.INFERENCES)
        opened.purge(NOW, 0.0)
        assert len(list((lake.folder / "inferences").glob("day=*/*"))) == 1

    def test_old_days_are_dropped(
        self, lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
    ):
        lake.move(inference(1), feedback(1), mirror(1), inference(2, at=NOW + 2 * DAY))
        lake.now += 366 * DAY
        lake.drain()
        assert lake.ids("inferences") == ["i00002"]
        assert lake.table("feedback").count() == 0
        assert lake.table("mirrors").count() == 0
        assert lake.query("SELECT sum(requests) FROM minutes") == [(1,)]

    def test_logs_stay_short(self, lake: Lake, inference: Inference):
        for number in range(60):
            lake.append(inference(number))
            lake.writer.cycle()
        logs = list((lake.folder / "inferences" / "_delta_log").iterdir())
        assert any("checkpoint.parquet" in log.name for log in logs)
        lake.restart()
        lake.move(inference(60))
        assert len(lake.ids("inferences")) == 61

    @pytest.mark.parametrize(
        ("found", "days"),
        [
            ([], []),
            ([("2026-01-02", 31, 5)], []),
            ([("2026-01-02", 32, 5)], ["2026-01-02"]),
            ([("2026-01-02", 2, TARGET_BYTES)], ["2026-01-02"]),
            ([("2026-01-02", 1, TARGET_BYTES)], []),
            ([("2026-01-01", 1, 5)], []),
            ([("2026-01-01", 2, 5)], ["2026-01-01"]),
            ([("2026-01-01", 2, 5), ("2025-01-01", 9, 5)], ["2025-01-01", "2026-01-01"]),
            ([(None, 31, 5)], []),
            ([(None, 32, 5)], [None]),
        ],
    )
    def test_which_days_are_merged(self, found: list[tuple], days: list[str | None]):
        def day(text: str | None) -> date | None:
            return None if text is None else date.fromisoformat(text)

        small = [SmallFiles(day(name), count, size) for name, count, size in found]
        assert worth_merging(small, date(2026, 1, 2)) == tuple(map(day, days))


class TestEvolution:
    def make(self, lake: Lake, columns: Iterable[tuple[str, str]], by: list[str] | None) -> None:
        fields = [Field(name, PrimitiveType(kind)) for name, kind in columns]
        DeltaTable.create(lake.folder / "inferences", Schema(fields), partition_by=by)
        lake.files.place.write_text('{"slot": "slot"}')

    def columns(self) -> list[tuple[str, str]]:
        return [(column.name, column.type) for column in schema.INFERENCES.columns]

    def test_a_table_of_an_earlier_version_gets_the_columns_that_it_lacks(
        self, lake: Lake, inference: Inference
    ):
        self.make(lake, self.columns()[:-2], ["day"])
        old = {"day": date(2026, 9, 20), "id": "old"}
        write_deltalake(
            lake.folder / "inferences",
            _one_row(self.columns()[:-2], old),
            mode="append",
        )
        lake.move(inference(1, response=b"42", unit="planted"))
        found = lake.query("SELECT id, response FROM inferences ORDER BY id")
        assert found == [("i00001", b"42"), ("old", None)]
        logs = (lake.folder / "inferences" / "_delta_log").glob("*.json")
        assert "planted" not in "".join(log.read_text() for log in logs)

    def test_a_lake_of_the_first_version_goes_on(
        self, lake: Lake, inference: Inference, feedback: Feedback, mirror: Mirror
    ):
        # With a batch under way, which one table has and the others lack.
        lake.worker.close()
        with tarfile.open(SAMPLES / "lake-1.tar.gz") as sample:
            sample.extractall(lake.folder.parent, filter="data")
        lake.worker = JournalWriter(lake.journals, "w1", 10**9)
        lake.now = NOW + DAY + 10
        lake.restart()
        lake.drain()
        assert lake.ids("inferences") == [f"i{number:05d}" for number in range(6)]
        assert lake.ids("feedback") == [f"f{number:05d}" for number in range(6)]
        compact_all(lake)  # files that all lack the new columns
        counts = lake.query(
            "SELECT sum(requests), sum(request_bytes), sum(input_tokens), count(*) FROM minutes"
            " WHERE slice = ''"
        )
        assert counts == [(6, 0, 0, 2)]
        lake.restart()
        at = {"at": NOW + DAY, "unit": "u1"}
        lake.move(
            inference(6, input_tokens=7, features={"rows": 1.0}, **at), feedback(6), mirror(6, **at)
        )
        compact_all(lake)  # files with and without them
        assert lake.query("SELECT id, input_tokens, protocol FROM inferences ORDER BY id")[-2:] == [
            ("i00005", None, None),
            ("i00006", 7, "oip-v2"),
        ]
        assert lake.query(
            "SELECT sum(requests), sum(input_tokens) FROM minutes WHERE slice = ''"
        ) == [(7, 7)]
        assert lake.ids("mirrors") == ["m00006"]
        lake.restart()
        lake.forget("u1", NOW + 2 * DAY)
        lake.drain()
        assert lake.ids("inferences") == ["i00005"]
        assert lake.table("mirrors").count() == 0

    def test_columns_of_a_later_version_are_left_empty(self, lake: Lake, inference: Inference):
        columns = [*self.columns(), ("later", "string")]
        self.make(lake, columns, ["day"])
        write_deltalake(
            lake.folder / "inferences",
            _one_row(columns, {"day": date(2026, 9, 21), "id": "new", "later": "kept"}),
            mode="append",
        )
        lake.move(inference(1), inference(2, unit="gone"))
        lake.forget("gone", NOW + 1)
        lake.move(inference(3))
        compact_all(lake)
        found = lake.query("SELECT id, later FROM inferences ORDER BY id")
        assert found == [("i00001", None), ("i00003", None), ("new", "kept")]

    @pytest.mark.parametrize("kind", ["string", "double"])
    def test_a_column_of_another_type_makes_records_wait(
        self, lake: Lake, inference: Inference, kind: str
    ):
        columns = [(name, kind if name == "status" else each) for name, each in self.columns()]
        self.make(lake, columns, ["day"])
        lake.append(inference(1))
        with pytest.raises(Unavailable, match=f"a column status of {kind}, not long.*; move it"):
            lake.writer.cycle()
        shutil.rmtree(lake.folder / "inferences")
        lake.drain()
        assert lake.ids("inferences") == ["i00001"]

    def test_a_table_with_other_partitions_makes_records_wait(
        self, lake: Lake, inference: Inference
    ):
        self.make(lake, self.columns(), None)
        lake.append(inference(1))
        with pytest.raises(Unavailable, match="is not partitioned"):
            lake.writer.cycle()
        assert len(JournalReader(lake.journals).read({}, 10)[0]) == 1


def _one_row(columns: Iterable[tuple[str, str]], values: dict[str, Any]) -> Any:
    """A row with these values, and none in other columns."""
    names = {"long": "bigint", "string": "varchar", "binary": "blob", "timestamp": "timestamptz"}
    texts = [
        f"CAST({repr(str(values[name])) if name in values else 'NULL'} AS {names.get(kind, kind)})"
        f" AS {name}"
        for name, kind in columns
    ]
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        return Table.from_arrow(database.sql(f"SELECT {', '.join(texts)}"))
