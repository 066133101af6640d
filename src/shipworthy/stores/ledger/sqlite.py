"""SQLite as the ledger's database: connections, transactions, and its errors in our words.

One file in WAL mode: a reader sees the state of its first statement and waits for nobody; writers
queue up at `BEGIN IMMEDIATE`, so that none finds out half-way that another one was quicker.

`synchronous=FULL`, although losing power is outside what we promise and NORMAL would survive any
killed process. With NORMAL a power cut can undo acts that the outside has seen already: an audit
head that was exported, a keeper's term that plans were published under, journal segments that were
deleted because they had been counted. The price is one fsync a commit, at a few commits a second.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

from sqlalchemy import URL, Connection, Engine, ExceptionContext, Table, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from shipworthy.errors import Conflict, LedgerUnavailable, ShipworthyError, UsageError

_READERS = 5
_WAL_LIMIT = 64 * 1024 * 1024
"""Bytes to which the write-ahead log shrinks again after a burst."""

_CURES = {
    sqlite3.SQLITE_BUSY: "is locked by another process; try again, or end the one that holds it",
    sqlite3.SQLITE_LOCKED: "is locked by another connection; try again",
    sqlite3.SQLITE_READONLY: "can't be written; check the permissions of the file and its folder",
    sqlite3.SQLITE_PERM: "can't be accessed; check the permissions of the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "can't be opened; check the permissions of the file and its folder",
    sqlite3.SQLITE_FULL: "has no space left to grow; free some disk space",
    sqlite3.SQLITE_IOERR: "can't be read or written by the disk; check the disk and its free space",
    sqlite3.SQLITE_NOTADB: "is no SQLite database; restore it from a backup or give another path",
    sqlite3.SQLITE_CORRUPT: "is damaged; restore it from a backup",
    sqlite3.SQLITE_ERROR: "does not fit this version; run `shipworthy doctor`",
}


class SqliteDatabase:
    """A ledger in a file; implements `database.Database`."""

    def __init__(self, url: URL) -> None:
        """Raises UsageError for a URL that names no file."""
        if not url.database or url.database == ":memory:" or url.query:
            raise UsageError(
                f"{url.render_as_string()} names no file; write sqlite:///relative/path.db or"
                " sqlite:////absolute/path.db"
            )
        self._file = Path(url.database).absolute()

    @property
    def name(self) -> str:
        """The file."""
        return str(self._file)

    def may_exist(self) -> bool:
        """Whether there is a file."""
        return self._file.is_file()

    def create(self) -> None:
        """Make the file, for its owner alone.

        One that is there is not even opened: closing it again would drop the locks that SQLite
        holds on it for this process, and others would delete the log that we are reading.
        """
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return
        except OSError as error:
            raise LedgerUnavailable(
                f"the ledger {self._file} can't be made ({error.strerror}); check the path and the"
                " permissions of its folder"
            ) from error

    def prepare(self, timeout: float) -> None:
        """Switch to write-ahead logging."""
        try:
            with closing(_connect(self._file, "rw", timeout)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.Error as error:
            raise _translated(error, self._file) from error

    def open_reader(self, timeout: float) -> Engine:
        """Connections that can only read; each transaction is one snapshot."""
        return _engine(self._file, "ro", "BEGIN", timeout, connections=_READERS)

    def open_writer(self, timeout: float) -> Engine:
        """One connection, which holds the writer's lock throughout a transaction."""
        return _engine(self._file, "rw", "BEGIN IMMEDIATE", timeout, connections=1)

    def open_migrator(self, timeout: float) -> Engine:
        """A writer that lets rows refer to missing ones: altering a table means rebuilding it."""
        return _engine(
            self._file, "rw", "BEGIN IMMEDIATE", timeout, connections=1, enforce_keys=False
        )

    def hold_schema(self, connection: Connection) -> None:
        """Nothing to do: a snapshot holds the tables as well as their rows."""

    def take_schema(self, connection: Connection) -> None:
        """Nothing to do: readers keep the tables that they saw first."""

    @contextmanager
    def unguarded(self, connection: Connection, table: str) -> Generator[None]:
        """Take the triggers away and put them back; it is all one transaction."""
        triggers = connection.exec_driver_sql(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?", (table,)
        ).all()
        for name, _ in triggers:
            connection.exec_driver_sql(f'DROP TRIGGER "{name}"')
        yield
        for _, statement in triggers:
            connection.exec_driver_sql(statement)

    def continue_sequence(self, connection: Connection, table: Table) -> None:
        """Nothing to do: the next number is one more than the highest."""


def _engine(
    file: Path,
    mode: str,
    begin: str,
    timeout: float,
    *,
    connections: int,
    enforce_keys: bool = True,
) -> Engine:
    def connect() -> sqlite3.Connection:
        return _connect(file, mode, timeout, enforce_keys=enforce_keys)

    # Threads of this process wait for a connection as long as other processes wait for the lock.
    engine = create_engine(
        "sqlite://",
        creator=connect,
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=timeout,
    )

    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    def note_file(_: object, record: ConnectionPoolEntry) -> None:
        record.info["file"] = _identity(file)

    def check_file(_: object, record: ConnectionPoolEntry, __: object) -> None:
        # A file that was moved away still takes writes, which nobody would see again.
        if record.info["file"] != _identity(file):
            raise DisconnectionError

    event.listen(engine, "connect", note_file)
    event.listen(engine, "checkout", check_file)
    event.listen(engine, "begin", start)
    event.listen(engine, "handle_error", _error_handler(file))
    return engine


def _connect(
    file: Path, mode: str, timeout: float, *, enforce_keys: bool = True
) -> sqlite3.Connection:
    # `isolation_level=None` keeps sqlite3 from beginning transactions by itself, which it does too
    # late (at the first write) and never for reads. The pool hands connections between threads.
    connection = sqlite3.connect(
        f"{file.as_uri()}?mode={mode}",
        uri=True,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.execute(f"PRAGMA foreign_keys = {int(enforce_keys)}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _error_handler(file: Path) -> Callable[[ExceptionContext], None]:
    def handle(context: ExceptionContext) -> NoReturn:
        raise _translated(context.original_exception, file) from context.original_exception

    return handle


def _translated(error: BaseException, file: Path) -> ShipworthyError:
    if isinstance(error, sqlite3.IntegrityError):
        return Conflict(
            f"the ledger refuses this change ({error}); read what it holds now and try again"
        )
    # The low byte is the kind of error, the rest a detail of it.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    state = _CURES.get(code, "does not answer; run `shipworthy doctor`")
    return LedgerUnavailable(f"the ledger {file} {state} ({error})")
