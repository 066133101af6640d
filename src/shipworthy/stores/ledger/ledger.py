"""The ledger itself: where it is, which version it has, and its transactions."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import URL, Connection, Engine, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from shipworthy.errors import LedgerUnavailable, UsageError
from shipworthy.stores.ledger import sqlite
from shipworthy.stores.ledger.access import SqlKeys, SqlPrincipals
from shipworthy.stores.ledger.audit import SqlAudit
from shipworthy.stores.ledger.delivery import (
    SqlCursors,
    SqlDeployments,
    SqlIntents,
    SqlPlans,
    SqlRollouts,
    SqlTerms,
)
from shipworthy.stores.ledger.evidence import SqlDecisions, SqlEvidence, SqlTombstones
from shipworthy.stores.ledger.registry import SqlPolicies, SqlReleases, SqlStages
from shipworthy.stores.ledger.schema import REVISIONS
from shipworthy.stores.ledger.traffic import SqlTraffic

TIMEOUT = 5.0
"""Seconds that a transaction waits for another one's lock."""


class SqlTransaction:
    """One consistent view of the ledger, topic by topic; implements `ports.Transaction`."""

    def __init__(self, connection: Connection) -> None:
        self.releases = SqlReleases(connection)
        self.policies = SqlPolicies(connection)
        self.principals = SqlPrincipals(connection)
        self.keys = SqlKeys(connection)
        self.evidence = SqlEvidence(connection)
        self.deployments = SqlDeployments(connection)
        self.stages = SqlStages(connection)
        self.intents = SqlIntents(connection)
        self.rollouts = SqlRollouts(connection)
        self.decisions = SqlDecisions(connection)
        self.plans = SqlPlans(connection)
        self.traffic = SqlTraffic(connection)
        self.cursors = SqlCursors(connection)
        self.terms = SqlTerms(connection)
        self.tombstones = SqlTombstones(connection)
        self.audit = SqlAudit(connection)


class SqlLedger:
    """The SQL database of decisions. Safe to share between threads; not across a fork.

    A context manager: leaving it closes the connections.
    """

    def __init__(self, readers: Engine, writer: Engine) -> None:
        self._readers = readers
        self._writer = writer

    @contextmanager
    def read(self) -> Generator[SqlTransaction]:
        """One consistent snapshot, which no writer waits for. Raises LedgerUnavailable."""
        with _transaction(self._readers) as connection:
            yield SqlTransaction(connection)

    @contextmanager
    def write(self) -> Generator[SqlTransaction]:
        """A transaction that holds the one writer's lock from its start; commits on a clean exit.

        Raises:
            LedgerUnavailable: The lock is held by another for too long, or the disk fails.
            Conflict: On exit, when rows refer to what is not there.

        """
        with _transaction(self._writer) as connection:
            yield SqlTransaction(connection)

    def close(self) -> None:
        """Close the connections; transactions still under way keep theirs until they end."""
        self._readers.dispose()
        self._writer.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_ledger(url: str, *, timeout: float = TIMEOUT) -> SqlLedger:
    """Open an existing ledger of this version's schema.

    Args:
        url: `sqlite:///relative/path.db` or `sqlite:////absolute/path.db`.
        timeout: Seconds that a transaction waits for another one's lock.

    Raises:
        UsageError: The URL names no kind of ledger that there is.
        LedgerUnavailable: It is missing, not readable, or of another schema version.

    """
    file = sqlite.file_of(_parse(url))
    if not file.is_file():
        raise LedgerUnavailable(_missing(file))
    readers = sqlite.open_reader(file, timeout)
    try:
        with _transaction(readers) as connection:
            _check_version(schema_version(connection, file), file)
    except BaseException:
        readers.dispose()
        raise
    return SqlLedger(readers, sqlite.open_writer(file, timeout))


def migrate(url: str, *, timeout: float = TIMEOUT) -> None:
    """Create the ledger, or bring its schema to this version, in one transaction.

    A new file can be read and written by its owner alone. Several processes may do this at once.

    Raises:
        UsageError: The URL names no kind of ledger that there is.
        LedgerUnavailable: It can't be written, is something else, or of a newer version.

    """
    from alembic import command
    from alembic.config import Config

    file = sqlite.file_of(_parse(url))
    _create(file)
    # Rebuilding a table, which is how SQLite alters one, must not trip over those that refer to it.
    writer = sqlite.open_writer(file, timeout, enforce_keys=False)
    try:
        with _transaction(writer) as connection:
            _check_migratable(connection, file)
        sqlite.use_wal(file, timeout)  # can't be done in a transaction
        with _transaction(writer) as connection:
            _check_migratable(connection, file)
            config = Config()
            config.set_main_option("script_location", f"{__package__}:migrations")
            config.attributes["connection"] = connection
            command.upgrade(config, REVISIONS[-1])
    finally:
        writer.dispose()


def schema_version(connection: Connection, file: Path) -> str | None:
    """The revision of the schema; None for an empty database, LedgerUnavailable for another's."""
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if "alembic_version" in tables and "audit_head" in tables:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    raise LedgerUnavailable(
        f"{file} is the database of something else; give the ledger a file of its own"
    )


def _check_migratable(connection: Connection, file: Path) -> None:
    version = schema_version(connection, file)
    if version is not None and version not in REVISIONS:
        _check_version(version, file)


def _check_version(version: str | None, file: Path) -> None:
    if version is None:
        raise LedgerUnavailable(_missing(file))
    if version not in REVISIONS:
        raise LedgerUnavailable(
            f"the ledger {file} has schema {version}, which a newer Shipworthy made (this one knows"
            f" {REVISIONS[-1]}); upgrade Shipworthy"
        )
    if version != REVISIONS[-1]:
        raise LedgerUnavailable(
            f"the ledger {file} has schema {version} and this version needs {REVISIONS[-1]};"
            " `shipworthy up` brings it up to date"
        )


def _missing(file: Path) -> str:
    return f"there is no ledger at {file}; put it back, or let `shipworthy up` make one"


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UsageError(f"{url!r} is no database URL; write sqlite:///ledger.db") from error
    if parsed.drivername not in {"sqlite", "sqlite+pysqlite"}:
        raise UsageError(
            f"{parsed.drivername} is no kind of ledger that there is; write sqlite:///ledger.db"
        )
    return parsed


def _create(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise LedgerUnavailable(
            f"the ledger {file} can't be made ({error.strerror}); check the path and the"
            " permissions of its folder"
        ) from error


@contextmanager
def _transaction(engine: Engine) -> Generator[Connection]:
    """Begin, and commit on a clean exit; what fails here and not in the database has one cause."""
    try:
        with engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise LedgerUnavailable(
            f"the ledger has no connection free ({type(error).__name__}); try again, or let fewer"
            " tasks use it at once"
        ) from error
