"""PostgreSQL as the ledger's database: connections, transactions, and its errors in our words.

A write holds one advisory lock from its start to its commit, as on SQLite: what was inserted later
is committed later, so "all after sequence n" misses nothing. A read is one snapshot.

The server ends the transaction of a client that stands still, so that a process which was stopped
or lost its network gives the lock back in seconds. Where the schema changes a reader's snapshot
does not help: it holds rows, not tables, and finds a table that was rebuilt empty. So each reader
holds the table with the version, and a migration waits until it has that table for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    ExceptionContext,
    Table,
    create_engine,
    event,
    func,
    select,
)

from shipworthy.errors import Conflict, LedgerUnavailable, ShipworthyError, UsageError

if TYPE_CHECKING:
    import psycopg

_READERS = 5
_WRITER_IDLE = 5.0
"""Seconds after which a writer that stands still loses its transaction and the lock."""
_READER_IDLE = 15.0
"""The same for a reader, for which only migrations wait."""
_STATEMENT = 30.0
"""Seconds that one statement may take; those of a migration may take any time."""
_UNANSWERED = 10.0
"""Seconds until a peer that acknowledges nothing counts as gone."""

_CONNECT = {
    "connect_timeout": 5,
    "fallback_application_name": "shipworthy",
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": int(_UNANSWERED * 1000),
}
# Ledgers in other schemas of the same database have locks of their own. The number spells "ship".
_LOCK = "SELECT pg_advisory_xact_lock(1936222576, current_schema()::regnamespace::oid::integer)"

# By the whole code of an error, else by its class, the first two characters.
_REFUSED = {"22": "refuses a value", "23": "refuses this change"}
_CURES = {
    "25006": "can't be written, its server is read-only; give the address of the primary server",
    "25P03": "gave up on a transaction that stood still; try again",
    "28": "refuses this account; check the user, and its password in PGPASSFILE or PGPASSWORD",
    "3D000": "does not exist; make the database with `createdb`, or give the URL of another one",
    "3F000": "has no schema to put tables into; make the first one of its search_path",
    "40": "was changed by another connection meanwhile; try again",
    "42501": "can't be used by this account; let the account own the database",
    "42P01": "lacks a table; restore it from a backup, or let `shipworthy up` make a new one",
    "53100": "has no space left to grow; free some disk space on its server",
    "53300": "has no connection free; raise max_connections on its server",
    "55P03": "is locked by another process; try again, or end the one that holds it",
    "57014": "took too long to answer; try again, and check the load of its server",
    "57": "ended the connection; try again, and check that the server runs",
    "58": "can't be read or written by its server; check the server's disk and log",
    "XX": "is damaged; restore it from a backup",
}
# On connecting there are only words. In another language the general cure is given.
_WORDS = {
    r'role ".*" does not exist|password|pg_hba': "28",
    r'database ".*" does not exist': "3D000",
    r"permission denied": "42501",
    r"too many": "53300",
    r"starting up|shutting down|recovery": "57",
}
_LOST = "can't be reached; check that the server runs, the address, the user and the password"
_OTHER = "does not answer; run `shipworthy doctor`"


class PostgresDatabase:
    """A ledger in a database's first schema; implements `database.Database`."""

    def __init__(self, url: URL) -> None:
        """Raises UsageError for a URL that makes no sense, LedgerUnavailable without psycopg."""
        if url.drivername not in {"postgresql", "postgresql+psycopg"}:
            raise UsageError(f"{url.drivername} is no driver that we use; write postgresql://…")
        if "@" in (url.host or ""):
            raise UsageError("the ledger's URL has two @; write %40 for one within a password")
        self._url = url.set(drivername="postgresql+psycopg")
        self.name = _name(url)
        _check(self._url, self.name)

    def may_exist(self) -> bool:
        """Always: only the server knows."""
        return True

    def create(self) -> None:
        """Nothing to do: who runs the server makes the database."""

    def prepare(self, timeout: float) -> None:
        """Nothing to do: a server is set up by who runs it."""

    def open_reader(self, timeout: float) -> Engine:
        """Connections that can only read; each transaction is one snapshot."""
        return _engine(
            self._url, _limits(timeout, _READER_IDLE), timeout, connections=_READERS, read_only=True
        )

    def open_writer(self, timeout: float) -> Engine:
        """One connection, which holds the writer's lock throughout a transaction."""
        engine = _engine(self._url, _limits(timeout, _WRITER_IDLE), timeout, connections=1)
        event.listen(engine, "begin", _lock)
        return engine

    def open_migrator(self, timeout: float) -> Engine:
        """A writer that waits until readers which stand still have been given up on."""
        limits = _limits(timeout + _READER_IDLE, _WRITER_IDLE) | {"statement_timeout": 0}
        engine = _engine(self._url, limits, timeout, connections=1)
        event.listen(engine, "begin", _lock)
        return engine

    def hold_schema(self, connection: Connection) -> None:
        """Hold the table that a migration takes. A LOCK takes no snapshot, so the wait is safe."""
        connection.exec_driver_sql("LOCK TABLE alembic_version IN ACCESS SHARE MODE")

    def take_schema(self, connection: Connection) -> None:
        """Take the table that readers hold, unless there is no ledger yet."""
        if connection.exec_driver_sql("SELECT to_regclass('alembic_version')").scalar():
            connection.exec_driver_sql("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")

    @contextmanager
    def unguarded(self, connection: Connection, table: str) -> Generator[None]:
        """Disable the triggers and enable them again; it is all one transaction."""
        connection.exec_driver_sql(f'ALTER TABLE "{table}" DISABLE TRIGGER USER')
        yield
        connection.exec_driver_sql(f'ALTER TABLE "{table}" ENABLE TRIGGER USER')

    def continue_sequence(self, connection: Connection, table: Table) -> None:
        """Set the sequence behind the column of that name to the highest number in it."""
        highest = func.max(table.c.sequence)
        owned = func.pg_get_serial_sequence(table.name, "sequence")
        connection.execute(select(func.setval(owned, highest)).where(table.c.sequence > 0))


def _lock(connection: Connection) -> None:
    connection.exec_driver_sql(_LOCK)


def _name(url: URL) -> str:
    """How messages call it. Built anew, since options after the `?` may hold a password too."""
    host = url.host or url.query.get("host")
    return URL.create(
        "postgresql",
        username=url.username,
        host=",".join(host) if isinstance(host, tuple) else host,
        port=url.port,
        database=url.database,
    ).render_as_string()


def _check(url: URL, name: str) -> None:
    try:
        import psycopg
        from psycopg.conninfo import make_conninfo
    except ImportError as error:
        raise LedgerUnavailable(
            f"the ledger {name} needs psycopg, which is not there; install shipworthy[postgres]"
        ) from error
    try:
        make_conninfo(**url.get_dialect()().create_connect_args(url)[1])
    except psycopg.Error as error:
        raise UsageError(
            f"the URL of the ledger {name} makes no sense ({_said(error)}); write"
            " postgresql://user@host:port/database"
        ) from None


def _limits(lock: float, idle: float) -> dict[str, float]:
    """How long the server lets a connection wait, work, stand still or be unreachable."""
    return {
        "lock_timeout": max(lock, 0.001),
        "idle_in_transaction_session_timeout": idle,
        "statement_timeout": _STATEMENT,
        "tcp_user_timeout": _UNANSWERED,
    }


def _engine(
    url: URL, limits: dict[str, float], timeout: float, *, connections: int, read_only: bool = False
) -> Engine:
    from psycopg import IsolationLevel

    # A connection that was lost while nobody used it is noticed and replaced before its next use.
    engine = create_engine(
        url,
        connect_args={key: each for key, each in _CONNECT.items() if key not in url.query},
        pool_size=connections,
        max_overflow=0,
        pool_timeout=timeout,
        pool_pre_ping=True,
        use_native_hstore=False,  # it would be asked for on connecting
    )
    name = _name(url)

    def set_up(connection: psycopg.Connection, _: object) -> None:
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            connection.close()
            raise LedgerUnavailable(
                f"the ledger {name} has the encoding {encoding}; make its database with UTF8"
            )
        # Not as options of the connection: those would hide PGOPTIONS and a service file's.
        pairs = ", ".join(f"set_config('{key}', %s, false)" for key in limits)
        milliseconds = [str(int(seconds * 1000)) for seconds in limits.values()]
        connection.execute(f"SELECT {pairs}".encode(), milliseconds)
        connection.commit()
        connection.read_only = read_only or None  # else as the server has it
        connection.isolation_level = (
            IsolationLevel.REPEATABLE_READ if read_only else IsolationLevel.READ_COMMITTED
        )

    event.listen(engine, "connect", set_up)
    event.listen(engine, "handle_error", _error_handler(name))
    return engine


def _error_handler(name: str) -> Callable[[ExceptionContext], None]:
    def handle(context: ExceptionContext) -> None:
        error = context.original_exception
        if isinstance(error, Exception) and not context.is_pre_ping:
            raise _translated(error, name) from error

    return handle


def _translated(error: BaseException, name: str) -> ShipworthyError:
    import psycopg

    code = getattr(error, "sqlstate", None) or ""
    if code[:2] in _REFUSED or isinstance(error, psycopg.DataError):
        refused = _REFUSED.get(code[:2], _REFUSED["22"])
        return Conflict(
            f"the ledger {refused} ({_said(error)}); read what it holds now and try again"
        )
    if isinstance(error, psycopg.OperationalError) and code[:2] in {"", "08"}:
        said = [known for words, known in _WORDS.items() if re.search(words, str(error))]
        state = _CURES[said[0]] if said else _LOST
    else:
        state = _CURES.get(code) or _CURES.get(code[:2], _OTHER)
    return LedgerUnavailable(f"the ledger {name} {state} ({_said(error)})")


def _said(error: BaseException) -> str:
    """The server's words on one line, without the details: those quote the rows."""
    diagnosis = getattr(error, "diag", None)
    return getattr(diagnosis, "message_primary", None) or " ".join(str(error).split())
