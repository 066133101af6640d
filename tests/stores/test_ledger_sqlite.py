"""The ledger in SQLite: its file, and its failures in our words."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from shipworthy.domain.terms import Term
from shipworthy.errors import LedgerUnavailable, UsageError
from shipworthy.stores.ledger import SqlLedger, SqlTransaction, migrate, open_ledger, schema

Unprivileged = Callable[[], AbstractContextManager[Path]]


def file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def execute(url: str, *statements: str) -> list:
    with closing(sqlite3.connect(file_of(url))) as connection, connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


@pytest.fixture
def empty_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


class TestSchema:
    def test_to_the_letter(self, ledger_url: str, tmp_path: Path):
        # What comparing metadata overlooks: checks, deferred keys, tables without row ids.
        declared = create_engine(f"sqlite:///{tmp_path / 'declared.db'}")
        schema.metadata.create_all(declared)
        declared.dispose()
        query = (
            "SELECT name, sql FROM sqlite_master WHERE type <> 'trigger'"
            " AND name NOT LIKE '%alembic%' ORDER BY name"
        )
        migrated, made = (
            [(name, sql and " ".join(sql.split())) for name, sql in execute(url, query)]
            for url in (ledger_url, f"sqlite:///{tmp_path / 'declared.db'}")
        )
        assert migrated == made  # but for line ends: an added column is put on the last one's line

    def test_a_new_ledger_is_its_owners_alone(self, tmp_path: Path):
        url = f"sqlite:///{tmp_path}/new/folder/with space?/ledger.db".replace("?", "%3F")
        migrate(url)
        with open_ledger(url) as ledger, ledger.write() as tx:
            tx.terms.put(Term(number=1))
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert len(files) == 3
            assert {path.stat().st_mode & 0o777 for path in files} == {0o600}

    def test_the_file_is_synced_and_logs_ahead(self, ledger: SqlLedger):
        with ledger.write() as tx:
            pragma = tx.audit._connection.exec_driver_sql
            assert pragma("PRAGMA journal_mode").scalar() == "wal"
            assert pragma("PRAGMA synchronous").scalar() == 2
            assert pragma("PRAGMA foreign_keys").scalar() == 1


class TestOpening:
    @pytest.mark.parametrize(
        "url",
        [
            "nonsense",
            "sqlite://",
            "sqlite:///:memory:",
            "mysql://host/db",
            "sqlite:///a.db?mode=ro",
        ],
    )
    def test_a_url_that_names_no_ledger(self, url: str):
        for act in (open_ledger, migrate):
            with pytest.raises(UsageError, match="write sqlite:///"):
                act(url)

    def test_a_missing_file_is_not_made(self, tmp_path: Path):
        with pytest.raises(LedgerUnavailable, match="shipworthy up"):
            open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_file(self, tmp_path: Path):
        (tmp_path / "ledger.db").touch()
        with pytest.raises(LedgerUnavailable, match="shipworthy up"):
            open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")

    def test_a_folder(self, tmp_path: Path):
        with pytest.raises(LedgerUnavailable, match=";"):
            open_ledger(f"sqlite:///{tmp_path}")
        with pytest.raises(LedgerUnavailable, match=";"):
            migrate(f"sqlite:///{tmp_path}")

    @pytest.mark.parametrize("act", [open_ledger, migrate])
    def test_something_that_is_no_database(self, tmp_path: Path, act: Callable[[str], object]):
        (tmp_path / "ledger.db").write_bytes(b"not a database at all" * 400)
        with pytest.raises(LedgerUnavailable, match="backup"):
            act(f"sqlite:///{tmp_path / 'ledger.db'}")

    @pytest.mark.parametrize("act", [open_ledger, migrate])
    def test_the_database_of_something_else(self, tmp_path: Path, act: Callable[[str], object]):
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        execute(url, "CREATE TABLE songs (title TEXT)")
        content = file_of(url).read_bytes()
        with pytest.raises(LedgerUnavailable, match="of its own"):
            act(url)
        assert file_of(url).read_bytes() == content

    def test_migrating_again_takes_no_log_from_those_who_read(self, ledger_url: str):
        with open_ledger(ledger_url) as ledger:
            with ledger.read() as tx:
                assert tx.terms.current().number == 0
            migrate(ledger_url)
            # Another process comes and goes. Were our locks gone, it would take itself for the
            # last one and delete the log, and what we read from then on would be garbage.
            statement = "UPDATE keeper_term SET number = 7"
            program = (
                "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1]);"
                f" connection.execute('{statement}'); connection.commit(); connection.close()"
            )
            subprocess.run([sys.executable, "-c", program, file_of(ledger_url)], check=True)
            assert file_of(f"{ledger_url}-wal").exists()
            with ledger.read() as tx:
                assert tx.terms.current().number == 7


def fill(tx: SqlTransaction) -> None:
    tx.audit._connection.exec_driver_sql("PRAGMA max_page_count = 1")
    for number in range(1_000):
        tx.audit.append(at=number, actor="p", act="a", subject="s" * 1_000)


class TestFailures:
    def test_a_file_that_is_moved_away_is_written_no_more(self, ledger_url: str):
        file, away = file_of(ledger_url), file_of(ledger_url).with_name("away.db")
        with open_ledger(ledger_url) as ledger:
            with ledger.write() as tx:
                tx.terms.put(Term(number=1))
            file.rename(away)
            for act in (ledger.read, ledger.write):
                with pytest.raises(LedgerUnavailable, match="can't be opened"), act():
                    pass
            away.rename(file)
            with ledger.write() as tx:
                assert tx.terms.current().number == 1

    def test_a_file_that_is_put_in_place_of_another_is_the_one_that_counts(
        self, ledger_url: str, tmp_path: Path
    ):
        other = f"sqlite:///{tmp_path / 'other.db'}"
        migrate(other)
        with open_ledger(other) as ledger, ledger.write() as tx:
            tx.terms.put(Term(number=9))
        with open_ledger(ledger_url) as ledger:
            with ledger.read() as tx:
                assert tx.terms.current().number == 0
            file_of(other).replace(file_of(ledger_url))
            for act in (ledger.read, ledger.write):
                with act() as tx:
                    assert tx.terms.current().number == 9

    def test_locked_by_another_process(self, ledger: SqlLedger, ledger_url: str):
        with closing(sqlite3.connect(file_of(ledger_url))) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerUnavailable, match="locked"), ledger.write():
                pass
            with ledger.read() as tx:
                assert tx.releases.list() == []

    def test_damaged(self, ledger_url: str):
        with open_ledger(ledger_url) as ledger, ledger.write() as tx:
            for number in range(200):
                tx.audit.append(at=number, actor="p", act="a", subject="s" * 200)
        with file_of(ledger_url).open("r+b") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(8192)
            handle.write(b"\xff" * (size - 8192))
        with (
            pytest.raises(LedgerUnavailable, match="backup"),
            open_ledger(ledger_url) as ledger,
            ledger.read() as tx,
        ):
            list(tx.audit.entries())

    def test_full(self, ledger: SqlLedger):
        with pytest.raises(LedgerUnavailable, match="free some disk space"), ledger.write() as tx:
            fill(tx)
        with ledger.read() as tx:
            assert tx.audit.head().sequence == 0

    def test_a_folder_that_can_not_be_written(self, unprivileged: Unprivileged, empty_sqlite: Path):
        content = empty_sqlite.read_bytes()
        with unprivileged() as folder:
            (folder / "ledger.db").write_bytes(content)
            folder.chmod(0o500)
            with (
                pytest.raises(LedgerUnavailable, match="permissions"),
                open_ledger(f"sqlite:///{folder}/ledger.db") as ledger,
                ledger.write(),
            ):
                pass
            with pytest.raises(LedgerUnavailable, match="permissions"):
                migrate(f"sqlite:///{folder}/new.db")

    def test_a_file_that_can_not_be_read(self, unprivileged: Unprivileged, empty_sqlite: Path):
        content = empty_sqlite.read_bytes()
        with unprivileged() as folder:
            (folder / "ledger.db").write_bytes(content)
            (folder / "ledger.db").chmod(0)
            with pytest.raises(LedgerUnavailable, match="permissions"):
                open_ledger(f"sqlite:///{folder}/ledger.db")
