"""`shipworthy query`, with its process, on a lake without anything running."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
from deltalake import write_deltalake
from tests.app.conftest import Town, wait_for

from shipworthy.app import querying
from shipworthy.app.querying import Question, ask_lake, new_file
from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.errors import Conflict, NotAllowed, Unavailable, UsageError
from shipworthy.stores.lake.rows import rows_of
from shipworthy.stores.lake.schema import INFERENCES

NOW = 1_790_000_000.0
ENDLESS = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"


def inference(number: int, **fields) -> InferenceRecord:
    return InferenceRecord(
        id=f"i{number}", at=NOW + number, plan="digits", model="digits", revision=1, key="k",
        assigned="stable", probability=1.0, outcome=Outcome.SUCCESS, status=200,
        release="digits@1", **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    batch = rows_of([inference(n, request=b"x" * 500) for n in range(3)])[INFERENCES]
    write_deltalake(folder / "inferences", batch, partition_by=["day"])
    return folder


@pytest.fixture
def here(town: Town, lake: Path) -> Town:
    settings = town.root / "shipworthy.yaml"
    settings.write_text(settings.read_text() + f"lake: {{url: {lake}}}\n")
    return town


def question(lake: Path, sql: str, **fields) -> Question:
    known: dict[str, Any] = {"format": "json", "memory": 1024**3, "seconds": 60.0}
    return Question(lake=str(lake), sql=sql, **(known | fields))


def children() -> set[int]:
    """Processes that answer questions, and were started by this one."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"shipworthy.app.querying" in words and parent == os.getpid():
                found.add(int(folder.name))
    return found


def test_a_table_is_for_people(here: Town) -> None:
    done = here.run("query", "SELECT id, request, [1] AS many FROM inferences ORDER BY id")
    assert done.code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:2] == [["id", "request", "many"], ["i0", "500", "bytes", "[1]"]]


def test_the_ledger_is_not_needed(here: Town) -> None:
    (here.root / ".shipworthy" / "ledger.db").rename(here.root / "away.db")
    assert "2" in here.sw("query", "SELECT 1 + 1 AS two")


def test_json_and_csv_go_to_the_screen_and_into_files(here: Town) -> None:
    sql = "SELECT id, time FROM inferences ORDER BY id"
    shown = here.sw("query", sql, "--format", "json")
    assert json.loads(shown)[0] == {"id": "i0", "time": "2026-09-21T14:13:20Z"}
    here.sw("query", sql, "--format", "json", "--output", "a.json")
    assert json.loads((here.root / "a.json").read_text()) == json.loads(shown)
    text = here.sw("query", sql, "--format", "csv")
    assert text.splitlines()[:2] == ["id,time", "i0,2026-09-21T14:13:20Z"]
    assert (here.root / "a.json").stat().st_mode & 0o777 == 0o600


def test_parquet_goes_into_a_file(here: Town) -> None:
    said = here.sw(
        "query", "FROM inferences", "--format", "parquet", "--output", "a.parquet", "--limit", "2"
    )
    assert "2 rows" in said
    file = here.root / "a.parquet"
    with duckdb.connect() as database:
        database.execute(f"SELECT count(*), sum(octet_length(request)) FROM '{file}'")
        assert database.fetchall() == [(2, 1000)]
    assert [path.name for path in here.root.iterdir() if path.name.startswith(".a")] == []


def test_rows_beyond_the_limit_are_told(here: Town) -> None:
    done = here.run("query", "FROM range(2000)")
    assert len(done.stdout.splitlines()) == 1001
    assert "more than these 1,000 rows" in done.stderr
    done = here.run("query", "FROM range(1000)", "--format", "json")
    assert len(json.loads(done.stdout)) == 1000
    assert done.stderr == ""
    assert len(here.sw("query", "FROM range(2000)", "--format", "csv").splitlines()) == 2001


def test_a_file_is_never_replaced(here: Town) -> None:
    (here.root / "a.csv").write_text("mine")
    done = here.run("query", "SELECT 1", "--format", "csv", "--output", "a.csv")
    assert done.code == 2
    assert "exists already" in done.stderr
    assert (here.root / "a.csv").read_text() == "mine"


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Conflict), new_file(tmp_path / "a"):
        (tmp_path / "a").write_text("theirs")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_a_full_disk_is_told_and_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"No space left.*make room"), new_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_file_that_failed(here: Town) -> None:
    before = sorted(here.root.iterdir())
    for shape in ("csv", "json", "parquet"):
        done = here.run("query", "SELECT nope", "--format", shape, "--output", "a.out")
        assert (done.code, "nope" in done.stderr) == (2, True)
    assert sorted(here.root.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("COPY (SELECT 1) TO 'x'",), 1, "only a statement that reads"),
        (("SELEC 1",), 2, "line 1"),
        (("SELECT 1", "--format", "xml"), 2, "formats are table, json, csv, parquet"),
        (("SELECT 1", "--format", "parquet"), 2, "--output"),
        (("SELECT 1", "--output", "x"), 2, "for the screen"),
        (("SELECT 1", "--memory", "much"), 2, "512MiB"),
        (("SELECT 1", "--memory", "1MiB"), 2, "too little memory"),
        (("SELECT 1", "--timeout", "soon"), 2, "soon"),
        (("SELECT 1", "--timeout", "99999999999d"), 2, "30d at most"),
        (("SELECT 1", "--memory", "9999999TiB"), 2, "more than any machine has"),
        (("SELECT 1", "--memory", "9" * 400), 2, "more than any machine has"),
        (("SELECT '\udcff'",), 2, "not UTF-8"),
        (("SELECT 1", "--format", "parquet", "--output", "\udcff"), 2, "not UTF-8"),
        (("SELECT list(range) FROM range(1000000000)", "--memory", "100MiB"), 3, "--memory"),
        (("SELECT 1", "--format", "csv", "--output", "none/x"), 3, "check its folder"),
    ],
)
def test_what_is_wrong_is_said(
    here: Town, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = here.run("query", *arguments)
    assert (done.code, said in done.stderr) == (code, True), done.output
    assert len(done.stderr.strip().splitlines()) == 1


def test_sql_may_come_from_standard_input(here: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 7 AS seven; -- from a file\n"))
    assert json.loads(here.sw("query", "-", "--format", "json")) == [{"seven": 7}]


def test_standard_input_that_is_no_text_is_told(
    here: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"SELECT '\xff'"), "utf-8"))
    done = here.run("query", "-")
    assert (done.code, "not UTF-8" in done.stderr) == (2, True)


def test_what_clients_sent_does_not_act_on_a_terminal(here: Town) -> None:
    said = here.sw("query", "SELECT concat('a', chr(27), '[31mb', chr(155), 'c', chr(13)) AS x")
    assert r"a\x1b[31mb\x9bc\x0d" in said


def test_a_plan_is_drawn(here: Town) -> None:
    assert "╰" in here.sw("query", "EXPLAIN SELECT count(*) FROM inferences")


def test_a_query_is_ended_at_its_time_and_leaves_nothing(lake: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="longer than 1 s"):
        ask_lake(question(lake, ENDLESS, seconds=1.0), lambda _: None)
    assert time.monotonic() - began < 30
    assert children() == set()


def test_one_that_ignores_everything_is_ended_too(
    lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, sys, time\nsignal.signal(15, 1)\nwhile True: time.sleep(1)"
    started: list[subprocess.Popen[Any]] = []

    def start(_: list[str], **options) -> subprocess.Popen[Any]:
        started.append(popen([sys.executable, "-c", deaf], **options))
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(querying.subprocess, "Popen", start)
    with pytest.raises(Unavailable, match="longer than 1 s"):
        ask_lake(question(lake, "SELECT 1", seconds=1.0), lambda _: None)
    assert started[0].returncode == -signal.SIGKILL


def test_nothing_is_left_of_one_that_is_told_to_end(here: Town) -> None:
    before = set(here.root.iterdir())
    command = [Path(sys.executable).with_name("shipworthy"), "query", ENDLESS]
    options = ["--format", "csv", "--output", "sums.csv"]
    asking = subprocess.Popen([*command, *options], cwd=here.root)
    wait_for(lambda: set(here.root.iterdir()) - before)
    asking.terminate()
    assert asking.wait() == 128 + signal.SIGTERM
    assert set(here.root.iterdir()) == before


def test_it_ends_with_whoever_asked(lake: Path) -> None:
    asking = (
        "import sys; from shipworthy.app.querying import *\n"
        "print('asking', flush=True)\n"
        "ask_lake(msgspec.json.decode(sys.argv[1], type=Question), lambda _: None)"
    )
    text = msgspec.json.encode(question(lake, ENDLESS)).decode()
    parent = subprocess.Popen([sys.executable, "-c", asking, text], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"asking\n"
    task = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = int(wait_for(task.read_text).split()[0])
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or _is_dead(child))


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_reader_that_goes_away_ends_it(lake: Path) -> None:
    def gone(_: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        ask_lake(question(lake, "FROM range(1000000000)", format="csv"), gone)
    assert children() == set()


def test_the_reader_s_own_time_is_not_counted(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    monotonic = time.monotonic

    def an_hour(piece: bytes) -> None:
        pieces.append(len(piece))

    monkeypatch.setattr(querying.time, "monotonic", lambda: monotonic() + 3600 * len(pieces))
    ending = ask_lake(question(lake, "FROM range(100000)", format="csv"), an_hour)
    assert ending.rows == 100_000
    assert len(pieces) > 1
    assert sum(pieces) > 500_000


def test_an_allocation_beyond_the_fence_is_told(lake: Path) -> None:
    sql = "SELECT repeat('x', 1000000) AS text FROM range(100000)"
    try:
        ask_lake(question(lake, sql, memory=64 * 1024**2), lambda _: None)
    except Unavailable as error:
        assert "memory" in str(error)  # noqa: PT017  # it may also fit, row by row


def test_files_that_vanish_before_the_answer_are_looked_for_anew(
    lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shipworthy.stores.lake import query

    opened: list[query.Lake] = []

    class Late(query.Lake):
        def run(self, sql: str, *, batch: int = 2048):
            opened.append(self)
            if len(opened) == 1:
                raise query.LakeChanged("gone")
            return super().run(sql, batch=batch)

    monkeypatch.setattr(query, "Lake", Late)
    out = io.BytesIO()
    ending = querying._answer(question(lake, "SELECT count(*) AS n FROM inferences"), out)
    assert (len(opened), ending.rows, json.loads(out.getvalue())) == (2, 1, [{"n": 3}])


@pytest.mark.parametrize(("code", "kind"), [(1, NotAllowed), (2, UsageError), (3, Unavailable)])
def test_an_error_crosses_as_what_it_is(lake: Path, code: int, kind: type[Exception]) -> None:
    said = b"noise\n" + msgspec.json.encode(querying.Ending(error="so", code=code))
    with pytest.raises(kind, match=r"^so$"):
        querying._ending(code, said, question(lake, ""))


def test_a_process_that_dies_is_told(lake: Path) -> None:
    with pytest.raises(Unavailable, match=r"ended with 1 \(boom\)"):
        querying._ending(1, b"Traceback\nboom\n", question(lake, ""))
    with pytest.raises(Unavailable, match="longer than"):
        querying._ending(-signal.SIGXCPU, b"", question(lake, ""))
    with pytest.raises(Unavailable, match="more memory"):
        querying._ending(-signal.SIGKILL, b"", question(lake, ""))
