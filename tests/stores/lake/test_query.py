"""SQL over a lake that the real writer made: what it says, and what it can't be made to do."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable, write_deltalake

from shipworthy.domain.records import Outcome
from shipworthy.errors import NotAllowed, ShipworthyError, Unavailable, UsageError
from shipworthy.gateway.tickets import TicketOffice
from shipworthy.stores.lake import questions
from shipworthy.stores.lake.formats import csv_of, json_of
from shipworthy.stores.lake.query import DERIVED, JOINED, KINDS, TYPES, Lake, LakeChanged, Limits
from shipworthy.stores.lake.rows import rows_of
from shipworthy.stores.lake.schema import INFERENCES, TABLES
from shipworthy.stores.lake.tables import LakeTable

NOW = 1_790_000_000.0
DAY = 86_400.0


def ask(folder: Path, sql: str) -> list[dict[str, Any]]:
    lake = Lake(folder)
    try:
        return lake.rows(sql)
    finally:
        lake.close()


@pytest.fixture
def filled(lake, inference, feedback) -> Path:
    """Three days; the newest has a failure, slices and feedback."""
    lake.move(
        inference(1, at=NOW - 2 * DAY, seconds=0.02),
        inference(2, at=NOW - DAY, unit="ab" * 8, request=b"\xff{}"),
        inference(3, outcome=Outcome.FAILURE, reason="timeout", seconds=3.0, release="digits@2",
                  slices={"country": "DE"}),
        feedback(1, at=NOW, value=2),
        feedback(2, at=NOW + 1, inference="i00001", value=5),
        feedback(3, at=NOW + 2, inference="i00001", kind="label", value="cat"),
        feedback(4, at=NOW + 3, inference="i00003", kind="outcome", value={"a": [1]}),
    )  # fmt: skip
    lake.decide("d1")
    lake.drain()
    return lake.folder


def test_an_empty_lake_has_all_tables_and_columns(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "none")
    for table in TABLES:
        told = {
            row["column_name"]: row["column_type"] for row in lake.rows(f"DESCRIBE {table.name}")
        }
        columns = {column.name: TYPES[column.type] for column in table.columns}
        assert list(told)[: len(columns)] == list(columns)
        assert {name: told[name] for name in columns} == columns
        assert set(told) - set(columns) == set(DERIVED.get(table.name, {}))
        assert lake.rows(f"FROM {table.name}") == []
    assert lake.rows(f"FROM {JOINED}") == []
    lake.close()


def test_a_filled_lake_has_the_same_columns(filled: Path, tmp_path: Path) -> None:
    for table in (*(table.name for table in TABLES), JOINED):
        assert ask(filled, f"DESCRIBE {table}") == ask(tmp_path / "none", f"DESCRIBE {table}")


def test_the_newest_feedback_of_each_kind_is_joined(filled: Path) -> None:
    rows = ask(filled, f"SELECT id, COLUMNS('feedback_.*') FROM {JOINED} ORDER BY id")
    assert [row["id"] for row in rows] == ["i00001", "i00002", "i00003"]
    assert [row["feedback_rating"] for row in rows] == [5.0, None, None]
    assert json.loads(rows[0]["feedback_label"]) == "cat"
    assert json.loads(rows[2]["feedback_outcome"]) == {"a": [1]}
    assert rows[1]["feedback_time"] is None


def test_bytes_that_are_no_text_are_shown_all_the_same(filled: Path) -> None:
    rows = ask(filled, "SELECT request, request_text FROM inferences WHERE id = 'i00002'")
    assert rows[0]["request"] == b"\xff{}"
    assert rows[0]["request_text"].endswith("{}")


def test_slices_are_json(filled: Path) -> None:
    assert ask(filled, "SELECT id FROM inferences WHERE slices->>'country' = 'DE'") == [
        {"id": "i00003"}
    ]


def test_files_from_before_a_column_have_no_value_there(
    filled: Path, inference: Callable[..., Any]
) -> None:
    table = filled / "inferences"
    batch = rows_of([inference(9)])[INFERENCES]
    shutil.rmtree(table)
    kept = [name for name in batch.schema.names if name not in ("status", "response")]
    write_deltalake(table, batch.select(kept), partition_by=["day"])
    assert ask(filled, "SELECT id, status, response_text FROM inferences") == [
        {"id": "i00009", "status": None, "response_text": None}
    ]
    write_deltalake(table, rows_of([inference(10)])[INFERENCES], mode="append", schema_mode="merge")
    rows = ask(filled, "SELECT id, status FROM inferences ORDER BY id")
    assert [row["status"] for row in rows] == [None, 200]


def test_one_day_is_read_from_its_own_files(filled: Path) -> None:
    plan = ask(
        filled, "EXPLAIN ANALYZE SELECT sum(seconds) FROM inferences WHERE day = '2026-09-21'"
    )
    assert "1/3" in plan[0]["plan"].replace(" ", "")


def test_a_lake_may_lie_anywhere(filled: Path, tmp_path: Path) -> None:
    place = tmp_path / "a [b] it's *odd? ünï"
    shutil.copytree(filled, place)
    assert ask(place, "SELECT count(*) AS n FROM inferences") == [{"n": 3}]


# --- what it can't be made to do ------------------------------------------------------------------

ESCAPES = [
    "FROM read_csv('/etc/passwd')", "FROM read_text('/etc/passwd')", "FROM read_blob('{lake}')",
    "FROM '/etc/passwd'", "FROM '/etc/passwd.csv'", 'FROM "/etc/passwd.parquet"',
    "FROM glob('/*')", "FROM 'http://127.0.0.1:1/a.parquet'", "SELECT getenv('HOME')",
    "FROM query('SELECT 1')", "FROM query_table('inferences')",
    "FROM query($$ WITH a AS (COPY (SELECT 1) TO '{file}') FROM a $$)",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "COPY (SELECT 1) TO '{out}'", "COPY inferences TO '{file}'", "EXPORT DATABASE '{out}'",
    "WITH a AS (COPY (SELECT 1) TO '{file}') SELECT * FROM a",
    "WITH a AS (COPY (SELECT 1) TO '{out}') SELECT 1",
    "SELECT (WITH a AS (COPY (SELECT 1) TO '{file}') SELECT count(*) FROM a)",
    "FROM (FROM (WITH a AS MATERIALIZED (COPY (SELECT 1) TO '{file}') FROM a))",
    "DESCRIBE (WITH a AS (COPY (SELECT 1) TO '{file}') FROM a)",
    "SUMMARIZE WITH a AS (COPY (SELECT 1) TO '{file}') FROM a",
    "EXPLAIN ANALYZE WITH a AS (COPY (SELECT 1) TO '{file}') FROM a",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{file}'", "EXPLAIN ANALYZE DROP VIEW inferences",
    "EXPLAIN ANALYZE EXPLAIN ANALYZE COPY (SELECT 1) TO '{file}'",
    "/* x */ EXPLAIN ANALYZE COPY (SELECT 1) TO '{file}'",
    "WITH a AS (DELETE FROM inferences RETURNING *) FROM a",
    "WITH a AS (INSERT INTO inferences SELECT * FROM inferences RETURNING *) FROM a",
    "SELECT 1) TO '{file}'; COPY (SELECT 1", "SELECT 1\n) TO '{out}' --",
    "SELECT 1; COPY (SELECT 1) TO '{file}'", "SELECT 1; SELECT 2", "", "-- nothing",
    "ATTACH '{out}'", "USE memory", "INSTALL httpfs", "LOAD httpfs", "LOAD '{file}'",
    "SET memory_limit = '100GB'", "SET lock_configuration = false", "RESET memory_limit",
    "SET GLOBAL enable_external_access = true", "PRAGMA enable_profiling", "PRAGMA version",
    "CALL pragma_version()", "CHECKPOINT", "VACUUM", "BEGIN", "PREPARE a AS SELECT 1",
    "EXECUTE a", "CREATE TABLE a AS SELECT 1", "CREATE MACRO a() AS TABLE FROM glob('/*')",
    "DROP VIEW inferences", "CREATE SECRET a (TYPE s3)", "SET VARIABLE a = 1",
    "FROM enable_logging(storage = 'file', storage_path = '{out}')", "FROM enable_profiling()",
    "FROM parquet_metadata('{file}')", "FROM parquet_kv_metadata('{file}')",
    "FROM which_secret('a', 's3')",
    "FROM sniff_csv('/etc/passwd')", "FROM sqlite_scan('{ledger}', 'keys')",
    "FROM force_checkpoint()",
    "FROM import_database('{out}')", "FROM Lake", "FROM folder", "FROM L",
]  # fmt: skip


@pytest.mark.parametrize("attempt", ESCAPES)
def test_nothing_but_the_lake_is_read_and_nothing_written(filled: Path, attempt: str) -> None:
    file = next((filled / "inferences").rglob("*.parquet"))
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    around = set(filled.parent.iterdir())
    lake = Lake(filled)
    places = {"lake": filled, "file": file, "out": filled.parent / "out", "ledger": "ledger.db"}
    for name, place in places.items():
        attempt = attempt.replace(f"{{{name}}}", str(place))
    with pytest.raises((UsageError, NotAllowed)):
        lake.rows(attempt)
    assert lake.rows("SELECT count(*) AS n FROM inferences") == [{"n": 3}]
    lake.close()
    assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before
    assert set(filled.parent.iterdir()) == around


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1;", "SELECT 1 -- so", "SELECT 1; -- so", "SELECT ';' AS a; /* so ; */",
        "WITH a AS (SELECT 1) FROM a", "VALUES (1)", "TABLE decisions LIMIT 1", "FROM range(1)",
        "SELECT 1 UNION ALL SELECT 2", "DESCRIBE inferences", "SHOW TABLES", "SUMMARIZE decisions",
        "EXPLAIN SELECT 1",
        "WITH RECURSIVE a AS (SELECT 1 UNION SELECT 1 FROM a) FROM a",
        "SELECT unnest([1, 2])", "FROM json_each('[1]')",
        "FROM (PIVOT inferences ON outcome IN ('success') USING count(*))",
        "SELECT 'COPY INSERT_NODE DELETE' AS text", "SELECT ';--' AS a",
    ],
)  # fmt: skip
def test_whatever_reads_is_answered(filled: Path, sql: str) -> None:
    assert ask(filled, sql)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT relase FROM inferences", r'"relase" not found.*"release"'),
        ("SELECT *\nFROM infrences", r'infrences does not exist; .*"inferences"'),
        ("SELECT 1\nFROM FROM", r"syntax error .* \(line 2\)"),
        ("SELECT 'a'::INT", "Could not convert string 'a'"),
        ("SELECT error('so')", "^so$"),
        ("SELECT $1", "arameter"),
    ],
)
def test_an_error_is_one_sentence_and_says_where(filled: Path, sql: str, said: str) -> None:
    with pytest.raises(ShipworthyError, match=said) as caught:
        ask(filled, sql)
    assert "\n" not in str(caught.value)


def test_a_query_ends_at_its_time(filled: Path) -> None:
    lake = Lake(filled, Limits(seconds=0.2))
    with pytest.raises(Unavailable, match=r"longer than 0\.2 s"):
        lake.rows("SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b")
    lake.close()


def test_a_query_ends_at_its_memory(filled: Path) -> None:
    lake = Lake(filled, Limits(memory=100 * 1024 * 1024))
    with pytest.raises(Unavailable, match="more memory than 100 MiB"):
        lake.rows("SELECT list(range) FROM range(1000000000)")
    lake.close()
    with pytest.raises(UsageError, match="too little memory"):
        Lake(filled, Limits(memory=1000))


def test_a_swept_file_is_told_apart(filled: Path) -> None:
    lake = Lake(filled)
    for file in (filled / "inferences").rglob("*.parquet"):
        file.unlink()
    with pytest.raises(LakeChanged, match="ask it again"):
        lake.rows("FROM inferences")
    lake.close()


def test_it_reads_one_version_while_the_lake_changes(filled: Path, lake, inference) -> None:
    opened = Lake(filled)
    lake.move(*(inference(number) for number in range(100, 120)))
    table = LakeTable(filled, INFERENCES)
    for day in {small.day for small in table.small_files()}:
        table.compact(day, NOW)
    assert opened.rows("SELECT count(*) AS n FROM inferences") == [{"n": 3}]
    assert ask(filled, "SELECT count(*) AS n FROM inferences") == [{"n": 23}]
    opened.close()


def test_a_damaged_table_is_told(filled: Path) -> None:
    for file in (filled / "inferences" / "_delta_log").iterdir():
        if file.is_file():
            file.write_bytes(b"{")
    with pytest.raises(Unavailable, match="can't be read as a table"):
        Lake(filled)


def test_a_full_disk_is_told(filled: Path) -> None:
    full = Path("/dev/full")
    lake = Lake(filled, output=full)
    with pytest.raises(Unavailable, match="make room on its disk"):
        lake.write_parquet("FROM inferences", full)
    lake.close()


# --- formats ------------------------------------------------------------------------------------

VALUES = """
SELECT TIMESTAMPTZ '2026-01-02 03:04:05+02' AS zoned, TIMESTAMP '2026-01-02 03:04:05.5' AS plain,
  DATE '2026-01-02' AS day, 'nan'::DOUBLE AS nan, '-inf'::DOUBLE AS least, NULL AS nothing,
  '\\xFF\\x00'::BLOB AS bytes, [TIMESTAMPTZ '2026-01-02 00:00:00+00'] AS many,
  {'a': [1, NULL]} AS deep,
  MAP {1: 'x'} AS map, 2::HUGEINT ** 2 AS power, 170141183460469231731687303715884105727 AS huge,
  1.50::DECIMAL(5, 2) AS money, true AS yes, '"quoted", lines' || chr(10) || 'ünï' AS text,
  INTERVAL 90 SECOND AS span, '290000-01-01'::TIMESTAMPTZ AS far,
  '6ba7b810-9dad-11d1-80b4-00c04fd430c8'::UUID AS uuid, 1 AS same, 2 AS same
"""


def test_each_value_has_its_json(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with lake.run(VALUES) as result:
        rows = json.loads(b"".join(json_of(result)))
    lake.close()
    assert rows == [
        {
            "zoned": "2026-01-02T01:04:05Z", "plain": "2026-01-02T03:04:05.500000Z",
            "day": "2026-01-02", "nan": "NaN", "least": "-Infinity", "nothing": None,
            "bytes": "/wA=", "many": ["2026-01-02T00:00:00Z"], "deep": {"a": [1, None]},
            "map": {"1": "x"}, "power": 4.0,
            "huge": "170141183460469231731687303715884105727", "money": 1.5, "yes": True,
            "text": '"quoted", lines\nünï', "span": "PT90S", "far": "290000-01-01 00:00:00",
            "uuid": "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "same": 1, "same_1": 2,
        }
    ]  # fmt: skip


def test_each_value_has_its_csv(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with lake.run(VALUES) as result:
        text = b"".join(csv_of(result)).decode()
    lake.close()
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row["zoned"] == "2026-01-02T01:04:05Z"
    assert (row["nan"], row["nothing"], row["bytes"], row["yes"]) == ("NaN", "", "/wA=", "true")
    assert (row["deep"], row["money"]) == ('{"a":[1,null]}', "1.50")
    assert row["text"] == '"quoted", lines\nünï'
    assert row["uuid"] == "6ba7b810-9dad-11d1-80b4-00c04fd430c8"


def test_no_rows_are_written_too(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    with lake.run("SELECT 1 AS a WHERE false") as result:
        assert b"".join(json_of(result)) == b"[]\n"
    with lake.run("SELECT 1 AS a WHERE false") as result:
        assert b"".join(csv_of(result)) == b"a\n"
    lake.close()


# --- a dashboard's questions ----------------------------------------------------------------------

WEEK = questions.Span(NOW - 7 * DAY, NOW + DAY, "digits")


def test_traffic_counts_requests_and_failures(filled: Path) -> None:
    rows = ask(filled, questions.traffic(WEEK))
    assert [(row["release"], row["requests"], row["failures"]) for row in rows] == [
        ("digits@1", 1, 0), ("digits@1", 1, 0), ("digits@2", 1, 1),
    ]  # fmt: skip
    (row,) = ask(filled, questions.traffic(questions.Span(NOW - 60, NOW + 60)))
    assert row["time"].timestamp() == NOW // 60 * 60 or row["time"].second == 0


def test_percentiles_are_within_a_step(lake, inference) -> None:
    lake.move(*(inference(number, seconds=number / 1000) for number in range(1, 101)))
    (row,) = ask(lake.folder, questions.latency(WEEK))
    assert row["requests"] == 100
    assert [row["p50"], row["p95"], row["p99"]] == pytest.approx([0.050, 0.095, 0.099], rel=0.06)
    (timed,) = ask(lake.folder, questions.latency(WEEK, every=86_400))
    assert timed["p99"] == row["p99"]


def test_reasons_and_slices_are_counted(filled: Path) -> None:
    assert ask(filled, questions.reasons(WEEK)) == [
        {"release": "digits@2", "outcome": "failure", "reason": "timeout", "requests": 1}
    ]
    assert ask(filled, questions.slices(WEEK)) == [
        {"slice": "country=DE", "release": "digits@2", "requests": 1, "failures": 1}
    ]


def test_the_newest_failures_come_first(lake, inference) -> None:
    failed = {"outcome": Outcome.FAILURE, "reason": "timeout"}
    lake.move(*(inference(number, at=NOW - number * DAY / 2, **failed) for number in range(6)))
    rows = ask(lake.folder, questions.newest_failures(WEEK, most=3))
    assert [row["id"] for row in rows] == ["i00000", "i00001", "i00002"]


def test_an_inference_is_found_by_its_id(lake, inference, feedback) -> None:
    office = TicketOffice(b"s" * 16, worker=b"w001")
    id = office.issue(at=NOW, key="k", arm="stable", unit=None)
    lake.move(
        inference(1, id=id, at=NOW + 3),
        inference(2),
        feedback(1, inference=id, at=NOW + 2 * DAY, value=1),
        feedback(2, inference=id, at=NOW + 3 * DAY, value=5),
    )
    (row,) = ask(lake.folder, questions.one_inference(id))
    assert row["id"] == id
    assert [one["value"] for one in row["feedback"]] == ["5.0", "1.0"]
    assert ask(lake.folder, questions.one_inference("i00002"))[0]["feedback"] is None
    assert ask(lake.folder, questions.one_inference("it's none")) == []


def test_the_version_that_is_opened_is_the_newest(filled: Path) -> None:
    DeltaTable(filled / "inferences").delete()
    assert ask(filled, "SELECT count(*) AS n FROM inferences") == [{"n": 0}]


# --- docs/lake.md ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[3] / "docs" / "lake.md").read_text()


def test_the_page_tells_each_column_as_it_is() -> None:
    told: dict[str, list[tuple[str, str]]] = {}
    table = ""
    for line in PAGE.splitlines():
        if heading := re.match(r"\*\*`(\w+)`\*\*, ", line):
            table = heading[1]
        elif row := re.match(r"\| `(\w+)` \| (\w+) \|", line):
            told.setdefault(table, []).append((row[1], row[2]))
    assert told == {
        table.name: [(column.name, column.type) for column in table.columns] for table in TABLES
    }
    for name in [name for derived in DERIVED.values() for name in derived]:
        assert f"`{name}`" in PAGE
    for kind in KINDS:
        assert f"`feedback_{kind}`" in PAGE


@pytest.mark.parametrize(
    "sql",
    re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL),
    ids=lambda sql: sql[:25],
)
def test_the_page_s_examples_are_answered(filled: Path, tmp_path: Path, sql: str) -> None:
    ask(filled, sql)
    assert ask(tmp_path / "none", sql) == []
