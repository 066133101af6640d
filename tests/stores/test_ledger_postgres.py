"""The ledger on PostgreSQL: its server's failures in our words, locks, passwords, rights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from postgres import ROLE, Databases, PostgresServer, wait_for
from sqlalchemy import create_engine, text

from shipworthy.errors import Conflict, LedgerUnavailable, UsageError
from shipworthy.stores.ledger import SqlLedger, SqlTransaction, migrate, open_ledger, schema

SECRET = "hush-%40-hush"


@pytest.fixture
def empty_url(databases: Databases) -> str:
    return databases.make()


@pytest.fixture
def ledger_url(databases: Databases) -> str:
    return databases.make(migrated=True)


@pytest.fixture
def own_server(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server for this test alone, as durable as a real one."""
    with PostgresServer(fsync=True) as server:
        yield server


def database_of(url: str) -> str:
    return url.rpartition("/")[2]


def append(tx: SqlTransaction, actor: str = "p") -> None:
    tx.audit.append(at=1.0, actor=actor, act="a", subject="s")


def count(ledger: SqlLedger) -> int:
    with ledger.read() as tx:
        return tx.audit.head().sequence


class TestSchema:
    def test_to_the_letter(self, databases: Databases, ledger_url: str, empty_url: str):
        # What comparing metadata overlooks: checks, deferred keys, sequences.
        engine = create_engine(empty_url.replace("postgresql:", "postgresql+psycopg:"))
        schema.metadata.create_all(engine)
        engine.dispose()
        queries = (
            (
                "SELECT conrelid::regclass::text, conname, condeferrable, condeferred,"
                " pg_get_constraintdef(oid) FROM pg_constraint"
                " WHERE connamespace = 'public'::regnamespace AND conname NOT LIKE 'alembic%'"
                " ORDER BY 1, 2"
            ),
            (
                "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
                " AND tablename <> 'alembic_version' ORDER BY 1"
            ),
            (
                "SELECT table_name, column_name, column_default, is_nullable, data_type,"
                " character_maximum_length FROM information_schema.columns WHERE table_schema ="
                " 'public' AND table_name <> 'alembic_version' ORDER BY 1, 2"
            ),
        )
        for query in queries:
            found = [
                databases.server.execute(query, database=database_of(url))
                for url in (ledger_url, empty_url)
            ]
            assert found[0]
            assert found[0] == found[1]

    @pytest.mark.parametrize("table", ["audit_entries", "audit_head"])
    def test_the_audit_log_is_not_truncated(self, ledger: SqlLedger, table: str):
        with ledger.write() as tx:
            append(tx)
        with pytest.raises(Conflict), ledger.writing() as connection:
            connection.execute(text(f"TRUNCATE {table}"))

    def test_it_lives_in_the_first_schema_of_the_path(self, databases: Databases, empty_url: str):
        urls = [f"{empty_url}?options=-csearch_path%3D{name}" for name in ("one", "two")]
        for url, name in zip(urls, ("one", "two"), strict=True):
            with pytest.raises(LedgerUnavailable, match="search_path"):
                migrate(url)
            databases.server.execute(
                f"CREATE SCHEMA {name} AUTHORIZATION {ROLE}",
                database=database_of(url[: url.index("?")]),
            )
            migrate(url)
        with open_ledger(urls[0]) as one, open_ledger(urls[1], timeout=0.3) as two:
            with one.write() as tx, two.write() as other:  # each has a lock of its own
                append(tx)
                assert other.audit.head().sequence == 0
            assert (count(one), count(two)) == (1, 0)


class TestConnections:
    def test_what_each_is_limited_by(self, ledger_url: str):
        expected = {
            "statement_timeout": "30s",
            "idle_in_transaction_session_timeout": "5s",
            "lock_timeout": "1500ms",
            "synchronous_commit": "on",
            "application_name": "shipworthy",
            "transaction_isolation": "read committed",
        }
        with open_ledger(ledger_url, timeout=1.5) as ledger:
            with ledger.writing() as connection:
                for name, value in expected.items():
                    assert connection.execute(text(f"SHOW {name}")).scalar() == value
                options = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
                assert options["tcp_user_timeout"] == "10000"
                assert options["keepalives_idle"] == "5"
            with ledger.reading() as connection:
                show = lambda name: connection.execute(text(f"SHOW {name}")).scalar()
                assert show("transaction_isolation") == "repeatable read"
                assert show("transaction_read_only") == "on"
                assert show("idle_in_transaction_session_timeout") == "15s"

    def test_it_goes_on_by_itself_after_a_restart(self, own_server: PostgresServer):
        url = own_server.create("ledger")
        migrate(url)
        with open_ledger(url) as ledger:
            for number, how in enumerate([signal.SIGINT, signal.SIGQUIT, signal.SIGKILL]):
                with ledger.write() as tx:
                    append(tx)
                assert count(ledger) == number + 1
                own_server.stop(how)
                for transaction in (ledger.read, ledger.write):
                    with pytest.raises(LedgerUnavailable, match="server runs"), transaction():
                        pass
                with pytest.raises(LedgerUnavailable, match="check that the server runs"):
                    open_ledger(url)
                own_server.start()
                assert count(ledger) == number + 1

    @pytest.mark.parametrize("kind", ["read", "write"])
    def test_a_connection_that_is_broken_off(
        self, ledger: SqlLedger, databases: Databases, ledger_url: str, kind: str
    ):
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"

        def lose_it_half_way() -> None:
            with getattr(ledger, kind)() as tx:
                databases.server.execute(end, [database_of(ledger_url)])
                tx.audit.head()

        with pytest.raises(LedgerUnavailable, match="try again"):
            lose_it_half_way()
        with ledger.write() as tx:
            append(tx)
        databases.server.execute(end, [database_of(ledger_url)])
        assert count(ledger) == 1

    def test_a_writer_that_stands_still_loses_the_lock(self, ledger_url: str):
        holder = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _HOLD, ledger_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        holder.send_signal(signal.SIGSTOP)
        try:
            with open_ledger(ledger_url, timeout=60) as ledger, ledger.write() as tx:
                assert tx.audit.head().sequence == 0
                append(tx, "standby")
        finally:
            holder.send_signal(signal.SIGCONT)
            _, said = holder.communicate("go on\n", timeout=60)
        assert holder.returncode == 3, said
        with open_ledger(ledger_url) as ledger, ledger.read() as tx:
            assert [entry.actor for entry in tx.audit.entries()] == ["standby"]


_HOLD = """
import sys
from shipworthy.errors import LedgerUnavailable
from shipworthy.stores.ledger import open_ledger
try:
    with open_ledger(sys.argv[1]) as ledger, ledger.write() as tx:
        tx.audit.append(at=1.0, actor="stopped", act="a", subject="s")
        print("holds", flush=True)
        sys.stdin.readline()
        tx.audit.append(at=1.0, actor="stopped", act="a", subject="s")
except LedgerUnavailable as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""


class TestRefusals:
    @pytest.mark.parametrize(
        "url",
        [
            f"postgresql://ada:{SECRET}@/db?nonsense=1",
            f"postgresql://ada:{SECRET}@host:port/db",
            f"postgresql://ada:{SECRET}@more@host/db",
            f"postgresql+asyncpg://ada:{SECRET}@host/db",
            f"postgresql://ada@host/db?password={SECRET}&nonsense=1",
        ],
    )
    def test_a_url_that_makes_no_sense(self, url: str):
        for act in (open_ledger, migrate):
            with pytest.raises(UsageError) as caught:
                act(url)
            assert "hush" not in str(caught.value)
            assert ";" in str(caught.value)

    def test_without_psycopg(self, monkeypatch: pytest.MonkeyPatch, ledger_url: str):
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(LedgerUnavailable, match=r"install shipworthy\[postgres\]"):
            open_ledger(ledger_url)

    @pytest.mark.parametrize("act", [open_ledger, migrate])
    def test_places_that_are_not_there(self, ledger_url: str, act: Any):
        missing = ledger_url.rpartition("/")[0] + "/none"
        with pytest.raises(LedgerUnavailable, match="createdb"):
            act(missing)
        with pytest.raises(LedgerUnavailable, match="check that the server runs"):
            act(f"postgresql://ada:{SECRET}@127.0.0.1:1/db")
        nobody = ledger_url.replace(ROLE, "nobody")
        with pytest.raises(LedgerUnavailable, match="check the user"):
            act(nobody)

    def test_another_encoding(self, databases: Databases):
        name = database_of(databases.make())
        databases.server.drop(name)
        databases.server.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
            f" LOCALE_PROVIDER libc OWNER {ROLE}"
        )
        with pytest.raises(LedgerUnavailable, match="UTF8"):
            migrate(databases.server.url(name))

    def test_an_account_that_owns_nothing(self, databases: Databases, ledger_url: str):
        server = databases.server
        server.execute("DO $$ BEGIN CREATE ROLE guest LOGIN; EXCEPTION WHEN OTHERS THEN END $$")
        url = server.url(database_of(ledger_url), "guest")
        for act in (open_ledger, migrate):
            with pytest.raises(LedgerUnavailable, match="let the account own"):
                act(url)

    def test_a_server_that_only_reads(self, databases: Databases, ledger_url: str):
        databases.server.execute(
            f"ALTER DATABASE {database_of(ledger_url)} SET default_transaction_read_only = on"
        )
        with open_ledger(ledger_url) as ledger:
            assert count(ledger) == 0
            with pytest.raises(LedgerUnavailable, match="primary"), ledger.write() as tx:
                append(tx)

    def test_no_connection_left(self, databases: Databases, ledger_url: str):
        databases.server.execute(f"ALTER DATABASE {database_of(ledger_url)} CONNECTION LIMIT 1")
        with (
            closing(psycopg.connect(ledger_url)),
            pytest.raises(LedgerUnavailable, match="max_connections"),
        ):
            open_ledger(ledger_url)

    def test_a_value_that_it_can_not_hold(self, ledger: SqlLedger):
        with pytest.raises(Conflict, match="value"), ledger.write() as tx:
            tx.principals.ensure("a\0b")
        with ledger.write() as tx:
            tx.principals.ensure("ab")

    def test_a_statement_that_takes_too_long(self, ledger: SqlLedger):
        with ledger.reading() as connection:
            connection.execute(text("SET LOCAL statement_timeout = 50"))
            with pytest.raises(LedgerUnavailable, match="too long"):
                connection.execute(text("SELECT pg_sleep(20)"))


class TestPasswords:
    @pytest.fixture
    def url(self, own_server: PostgresServer) -> str:
        """A ledger whose account needs a password."""
        own_server.execute("CREATE ROLE ada LOGIN PASSWORD 'hush-@-hush'")
        own_server.create("ledger")
        own_server.execute("ALTER DATABASE ledger OWNER TO ada")
        rules = own_server.folder / "data" / "pg_hba.conf"
        rules.write_text("host all ada all scram-sha-256\n" + rules.read_text())
        own_server.execute("SELECT pg_reload_conf()")
        return own_server.url("ledger", "ada")

    def test_ways_to_give_one(self, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        with pytest.raises(LedgerUnavailable, match="PGPASSFILE"):
            migrate(url)
        with monkeypatch.context() as patch:
            patch.setenv("PGPASSWORD", "wrong")
            with pytest.raises(LedgerUnavailable, match="PGPASSFILE") as caught:
                migrate(url.replace("ada@", "ada:hush@"))
            assert "hush" not in str(caught.value)
        migrate(url.replace("ada@", f"ada:{SECRET}@"))
        with monkeypatch.context() as patch:
            patch.setenv("PGPASSWORD", "hush-@-hush")
            open_ledger(url).close()
        with monkeypatch.context() as patch:
            file = tmp_path / "passwords"
            file.write_text("*:*:*:ada:hush-@-hush\n")
            file.chmod(0o600)
            patch.setenv("PGPASSFILE", str(file))
            open_ledger(url).close()
        with monkeypatch.context() as patch:
            file = tmp_path / "services"
            port = url.rpartition(":")[2].partition("/")[0]
            file.write_text(
                f"[ours]\nhost=127.0.0.1\nport={port}\nuser=ada\npassword=hush-@-hush\n"
                "dbname=ledger\n"
            )
            patch.setenv("PGSERVICEFILE", str(file))
            open_ledger("postgresql://?service=ours").close()


def test_limits_of_the_environment_are_kept(ledger_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=1234kB")
    with open_ledger(ledger_url) as ledger, ledger.reading() as connection:
        assert connection.execute(text("SHOW work_mem")).scalar() == "1234kB"


def test_a_migration_does_not_wait_for_ever_for_a_reader(
    ledger: SqlLedger, ledger_url: str, monkeypatch: pytest.MonkeyPatch
):
    engine = ledger._database.open_migrator(0.2)
    with ledger.reading(), engine.begin() as connection:
        connection.execute(text("SET LOCAL lock_timeout = 200"))
        with pytest.raises(LedgerUnavailable, match="locked"):
            ledger._database.take_schema(connection)
    engine.dispose()


def test_the_server_ends_with_us(tmp_path: Path):
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from postgres import PostgresServer\n"
        "server = PostgresServer().start(); print(server.pid, server.folder, flush=True)\n"
        "os._exit(9)"
    )
    bench = Path(__file__).parents[2] / "bench"
    done = subprocess.run(
        [sys.executable, "-c", program, bench], capture_output=True, text=True, check=False
    )
    pid, folder = done.stdout.split()
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110
    subprocess.run(["rm", "-rf", folder], check=True)
