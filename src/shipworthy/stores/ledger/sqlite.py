"""SQLite as the ledger's database: connections, transactions, and its errors in our words.

One file in WAL mode: a reader sees the state of its first statement and waits for nobody; writers
queue up at `BEGIN IMMEDIATE`, so that none finds out half-way that another one was quicker.

`synchronous=FULL`, although losing power is outside what we promise and NORMAL would survive any
killed process. With NORMAL a power cut can undo acts that the outside has seen already: an audit
head that was exported, a keeper's term that plans were published under, journal segments that were
deleted because they had been counted. The price is one fsync a commit, at a few commits a second.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.pool import QueuePool

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


def file_of(url: URL) -> Path:
    """The database file that a URL names; UsageError for one in memory."""
    if not url.database or url.database == ":memory:" or url.query:
        raise UsageError(
            f"{url} names no file; write sqlite:///relative/path.db or sqlite:////absolute/path.db"
        )
    return Path(url.database).absolute()


def open_reader(file: Path, timeout: float) -> Engine:
    """Give an engine whose connections can only read; each transaction is one snapshot."""
    return _engine(file, "ro", "BEGIN", timeout, connections=_READERS)


def open_writer(file: Path, timeout: float, *, enforce_keys: bool = True) -> Engine:
    """Give an engine of one connection that holds the writer's lock throughout a transaction.

    Args:
        file: An existing file.
        timeout: Seconds to wait for another writer.
        enforce_keys: Whether rows must not refer to missing ones.

    """
    return _engine(file, "rw", "BEGIN IMMEDIATE", timeout, connections=1, enforce_keys=enforce_keys)


def use_wal(file: Path, timeout: float) -> None:
    """Switch a database to write-ahead logging, for good; raises LedgerUnavailable."""
    try:
        with closing(_connect(file, "rw", timeout)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.Error as error:
        raise translated(error, file) from error


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


def _error_handler(file: Path) -> Callable[[ExceptionContext], None]:
    def handle(context: ExceptionContext) -> NoReturn:
        raise translated(context.original_exception, file) from context.original_exception

    return handle


def translated(error: BaseException, file: Path) -> ShipworthyError:
    """Give what an error of the database means to people, with the cure."""
    if isinstance(error, sqlite3.IntegrityError):
        return Conflict(
            f"the ledger refuses this change ({error}); read what it holds now and try again"
        )
    # The low byte is the kind of error, the rest a detail of it.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    state = _CURES.get(code, "does not answer; run `shipworthy doctor`")
    return LedgerUnavailable(f"the ledger {file} {state} ({error})")
