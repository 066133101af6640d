"""The ledger in SQLite: its schema, its failures in our words, and several processes at once."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from shipworthy.domain import audit
from shipworthy.domain.terms import Term
from shipworthy.errors import Conflict, LedgerUnavailable, UsageError
from shipworthy.stores.ledger import SqlLedger, SqlTransaction, migrate, open_ledger, schema

Unprivileged = Callable[[], AbstractContextManager[Path]]


def file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def execute(url: str, *statements: str) -> list:
    with closing(sqlite3.connect(file_of(url))) as connection, connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


class TestSchema:
    def test_replayed_migrations_make_the_declared_schema(self, ledger_url: str):
        engine = create_engine(ledger_url)
        with engine.connect() as connection:
            options = {"compare_type": True, "compare_server_default": True}
            context = MigrationContext.configure(connection, opts=options)
            assert compare_metadata(context, schema.metadata) == []
        engine.dispose()

    def test_to_the_letter(self, ledger_url: str, tmp_path: Path):
        # What comparing metadata overlooks: checks, deferred keys, tables without row ids.
        declared = create_engine(f"sqlite:///{tmp_path / 'declared.db'}")
        schema.metadata.create_all(declared)
        declared.dispose()
        query = (
            "SELECT name, sql FROM sqlite_master WHERE type <> 'trigger'"
            " AND name NOT LIKE '%alembic%' ORDER BY name"
        )
        migrated = execute(ledger_url, query)
        assert migrated == execute(f"sqlite:///{tmp_path / 'declared.db'}", query)

    def test_every_revision_is_known_in_order(self):
        scripts = ScriptDirectory(str(Path(schema.__file__).with_name("migrations")))
        replayed = [script.revision for script in scripts.walk_revisions()][::-1]
        assert replayed == list(schema.REVISIONS)

    def test_migrating_again_changes_nothing(self, ledger_url: str):
        with open_ledger(ledger_url) as ledger, ledger.write() as tx:
            tx.audit.append(at=1.0, actor="p", act="a", subject="s")
        migrate(ledger_url)
        with open_ledger(ledger_url) as ledger, ledger.read() as tx:
            assert tx.audit.head().sequence == 1

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

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit_entries SET actor = 'somebody else'",
            "DELETE FROM audit_entries",
            "DELETE FROM audit_head",
            "UPDATE audit_head SET sequence = 0",
            "INSERT INTO audit_head (id, sequence, hash) VALUES (2, 0, '')",
        ],
    )
    def test_the_audit_log_is_append_only(self, ledger: SqlLedger, statement: str):
        with ledger.write() as tx:
            tx.audit.append(at=1.0, actor="p", act="a", subject="s")
        with pytest.raises(Conflict), ledger.write() as tx:
            tx.audit._connection.execute(text(statement))


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

    def test_a_newer_schema(self, ledger_url: str):
        execute(ledger_url, "UPDATE alembic_version SET version_num = '9999'")
        for act in (open_ledger, migrate):
            with pytest.raises(LedgerUnavailable, match="upgrade Shipworthy"):
                act(ledger_url)

    def test_an_older_schema(self, ledger_url: str, monkeypatch: pytest.MonkeyPatch):
        newer = (*schema.REVISIONS, "next")
        monkeypatch.setattr("shipworthy.stores.ledger.ledger.REVISIONS", newer)
        with pytest.raises(LedgerUnavailable, match="shipworthy up"):
            open_ledger(ledger_url)


def fill(tx: SqlTransaction) -> None:
    tx.audit._connection.exec_driver_sql("PRAGMA max_page_count = 1")
    for number in range(1_000):
        tx.audit.append(at=number, actor="p", act="a", subject="s" * 1_000)


class TestFailures:
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

    def test_content_of_another_version(self, ledger: SqlLedger, ledger_url: str):
        execute(
            ledger_url,
            "INSERT INTO principals (id, name, kind) VALUES ('p', 'ada', 'android')",
            "INSERT INTO plans (name, plan) VALUES ('digits', '{}')",
            "INSERT INTO rollouts (id, model, status, started, state)"
            " VALUES ('r', 'digits', 'x', 1, x'c1')",
            "INSERT INTO rollout_units (rollout, unit, history) VALUES ('r', 'u', x'c1')",
        )
        with ledger.read() as tx:
            for act in (
                lambda: tx.principals.get("p"),
                tx.plans.all,
                tx.rollouts.active,
                lambda: tx.rollouts.units("r"),
            ):
                with pytest.raises(LedgerUnavailable, match="newer"):
                    act()

    def test_a_table_that_is_gone(self, ledger: SqlLedger, ledger_url: str):
        execute(ledger_url, "DROP TABLE plans")
        with pytest.raises(LedgerUnavailable, match=";"), ledger.read() as tx:
            tx.plans.all()

    def test_more_readers_than_connections(self, ledger: SqlLedger):
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(ledger.read())
            with pytest.raises(LedgerUnavailable, match="no connection free"):
                stack.enter_context(ledger.read())


_APPEND = """
import sys
from shipworthy.stores.ledger import open_ledger
with open_ledger(sys.argv[1], timeout=20) as ledger:
    for number in range(25):
        with ledger.write() as tx:
            tx.audit.append(at=number, actor=sys.argv[2], act="count", subject=str(number))
"""

_HOLD_AND_DIE = """
import os, sys
from shipworthy.stores.ledger import open_ledger
with open_ledger(sys.argv[1]) as ledger, ledger.write() as tx:
    tx.cursors.save({"half": 1})
    tx.audit.append(at=1.0, actor="killed", act="a", subject="s")
    os._exit(9)
"""

_MIGRATE = """
import sys
from shipworthy.stores.ledger import migrate
migrate(sys.argv[1], timeout=20)
"""


def run_all(*commands: tuple[str, ...]) -> list[int]:
    started = [subprocess.Popen([sys.executable, "-W", "error", "-c", *args]) for args in commands]
    return [process.wait(60) for process in started]


class TestProcesses:
    def test_writers_of_several_processes_make_one_chain(self, ledger: SqlLedger, ledger_url: str):
        stop = threading.Event()
        seen: list[int] = []

        def watch() -> None:
            while not stop.is_set():
                with ledger.read() as tx:
                    entries = list(tx.audit.entries())
                    assert tx.audit.head().sequence == len(entries)
                    seen.append(len(entries))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert run_all(*((_APPEND, ledger_url, name) for name in "ab")) == [0, 0]
        finally:
            stop.set()
            watcher.join()
        assert seen == sorted(seen)
        with ledger.read() as tx:
            entries = list(tx.audit.entries())
        assert audit.verify(entries) == []
        assert sorted(e.actor for e in entries) == ["a"] * 25 + ["b"] * 25

    def test_a_killed_writer_leaves_nothing(self, ledger: SqlLedger, ledger_url: str):
        assert run_all((_HOLD_AND_DIE, ledger_url)) == [9]
        with ledger.write() as tx:
            assert tx.cursors.load() == {}
            assert tx.audit.head().sequence == 0

    def test_all_may_migrate_at_once(self, tmp_path: Path):
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        assert run_all((_MIGRATE, url), (_MIGRATE, url)) == [0, 0]
        with open_ledger(url) as ledger, ledger.read() as tx:
            assert tx.audit.head().sequence == 0
