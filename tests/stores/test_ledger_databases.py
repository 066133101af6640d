"""What a ledger promises on either database: schema, versions, and several processes at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from shipworthy.domain import audit
from shipworthy.errors import Conflict, LedgerUnavailable
from shipworthy.stores.ledger import SqlLedger, migrate, open_ledger, schema


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


class TestSchema:
    def test_replayed_migrations_make_the_declared_schema(self, ledger_url: str):
        engine = create_engine(ledger_url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.connect() as connection:
            options = {"compare_type": True, "compare_server_default": True}
            context = MigrationContext.configure(connection, opts=options)
            assert compare_metadata(context, schema.metadata) == []
        engine.dispose()

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


class TestVersions:
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

    def test_nothing_yet(self, empty_url: str):
        with pytest.raises(LedgerUnavailable, match="shipworthy up"):
            open_ledger(empty_url)

    def test_the_database_of_something_else(self, empty_url: str):
        execute(empty_url, "CREATE TABLE songs (title TEXT)")
        for act in (open_ledger, migrate):
            with pytest.raises(LedgerUnavailable, match="of its own"):
                act(empty_url)


class TestFailures:
    def test_content_of_another_version(self, ledger: SqlLedger, ledger_url: str):
        octet = "x'c1'" if ledger_url.startswith("sqlite") else r"'\xc1'"
        execute(
            ledger_url,
            "INSERT INTO principals (id, name, kind) VALUES ('p', 'ada', 'android')",
            "INSERT INTO plans (name, plan) VALUES ('digits', '{}')",
            "INSERT INTO rollouts (id, model, status, started, state)"
            f" VALUES ('r', 'digits', 'x', 1, {octet})",
            f"INSERT INTO rollout_units (rollout, unit, history) VALUES ('r', 'u', {octet})",
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

    def test_the_version_is_gone(self, ledger: SqlLedger, ledger_url: str):
        execute(ledger_url, "DELETE FROM alembic_version")
        for transaction in (ledger.read, ledger.write):
            with pytest.raises(LedgerUnavailable, match="no ledger"), transaction():
                pass

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

    def test_all_may_migrate_at_once(self, empty_url: str):
        assert run_all(*[(_MIGRATE, empty_url)] * 3) == [0, 0, 0]
        with open_ledger(empty_url) as ledger, ledger.read() as tx:
            assert tx.audit.head().sequence == 0
