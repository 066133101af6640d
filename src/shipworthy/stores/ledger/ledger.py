"""The ledger itself: where it is, which version it has, and its transactions."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Self

from sqlalchemy import URL, Connection, Engine, String, column, inspect, make_url, select, table
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from shipworthy.errors import LedgerUnavailable, UsageError
from shipworthy.stores.ledger.access import SqlKeys, SqlPrincipals
from shipworthy.stores.ledger.audit import SqlAudit
from shipworthy.stores.ledger.database import Database, missing
from shipworthy.stores.ledger.delivery import (
    SqlCursors,
    SqlDeployments,
    SqlIntents,
    SqlPlans,
    SqlRollouts,
    SqlTerms,
)
from shipworthy.stores.ledger.evidence import SqlDecisions, SqlEvidence, SqlTombstones
from shipworthy.stores.ledger.postgres import PostgresDatabase
from shipworthy.stores.ledger.registry import SqlPolicies, SqlReleases, SqlStages
from shipworthy.stores.ledger.schema import REVISIONS
from shipworthy.stores.ledger.sqlite import SqliteDatabase
from shipworthy.stores.ledger.traffic import SqlTraffic

TIMEOUT = 5.0
"""Seconds that a transaction waits for another one's lock."""

_KINDS: dict[str, Callable[[URL], Database]] = {
    "sqlite": SqliteDatabase,
    "postgresql": PostgresDatabase,
}
_URLS = "write sqlite:///ledger.db or postgresql://user@host/database"
_VERSION = select(column("version_num", String)).select_from(table("alembic_version"))


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

    def __init__(self, database: Database, timeout: float) -> None:
        self._database = database
        self._readers = database.open_reader(timeout)
        self._writer = database.open_writer(timeout)

    @contextmanager
    def read(self) -> Generator[SqlTransaction]:
        """One consistent snapshot, which no writer waits for. Raises LedgerUnavailable."""
        with self.reading() as connection:
            yield SqlTransaction(connection)

    @contextmanager
    def write(self) -> Generator[SqlTransaction]:
        """A transaction that holds the one writer's lock from its start; commits on a clean exit.

        Raises:
            LedgerUnavailable: The lock is held by another for too long, the disk fails, or the
                server is gone. If it went during the commit, only a read tells what was kept.
            Conflict: On exit, when rows refer to what is not there.

        """
        with self.writing() as connection:
            yield SqlTransaction(connection)

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """As `read`, for what works on whole tables."""
        with _transaction(self._readers) as connection:
            self._database.hold_schema(connection)
            self._check_version(connection)
            yield connection

    @contextmanager
    def writing(self) -> Generator[Connection]:
        """As `write`, for what works on whole tables."""
        with _transaction(self._writer) as connection:
            self._check_version(connection)
            yield connection

    def _check_version(self, connection: Connection) -> None:
        """Stop a process that has outlived an upgrade before it misreads or miswrites a row."""
        _check_version(connection.execute(_VERSION).scalar(), self._database.name)

    def check(self) -> None:
        """LedgerUnavailable unless it is a ledger, and of this version."""
        with _transaction(self._readers) as connection:
            _check_version(schema_version(connection, self._database.name), self._database.name)

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
        url: `sqlite:///relative/path.db`, `sqlite:////absolute/path.db` or
            `postgresql://user@host/database`.
        timeout: Seconds that a transaction waits for another one's lock.

    Raises:
        UsageError: The URL names no kind of ledger that there is.
        LedgerUnavailable: It is missing, not readable, or of another schema version.

    """
    database = database_at(url)
    if not database.may_exist():
        raise missing(database.name)
    ledger = SqlLedger(database, timeout)
    try:
        ledger.check()
    except BaseException:
        ledger.close()
        raise
    return ledger


def migrate(url: str, *, timeout: float = TIMEOUT) -> None:
    """Create the ledger, or bring its schema to this version, in one transaction.

    A new file can be read and written by its owner alone. Several processes may do this at once.

    Raises:
        UsageError: The URL names no kind of ledger that there is.
        LedgerUnavailable: It can't be written, is something else, or of a newer version.

    """
    database = database_at(url)
    database.create()
    migrator = database.open_migrator(timeout)
    try:
        with _transaction(migrator) as connection:
            _check_migratable(connection, database.name)
        database.prepare(timeout)
        with _transaction(migrator) as connection:
            if _check_migratable(connection, database.name) != REVISIONS[-1]:
                database.take_schema(connection)
                _upgrade(connection, REVISIONS[-1])
    finally:
        migrator.dispose()


def is_ledger(url: str, *, timeout: float = TIMEOUT) -> bool:
    """Whether there is one, of whatever version; LedgerUnavailable when nobody can tell."""
    database = database_at(url)
    if not database.may_exist():
        return False
    reader = database.open_reader(timeout)
    try:
        with _transaction(reader) as connection:
            return schema_version(connection, database.name) is not None
    finally:
        reader.dispose()


def database_at(url: str) -> Database:
    """Give the database that a URL names; UsageError when it names none."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # which may quote a password, so nobody sees it
        raise UsageError(f"the ledger's address is no database URL; {_URLS}") from None
    kind = _KINDS.get(parsed.get_backend_name())
    if kind is None:
        raise UsageError(f"{parsed.drivername} is no kind of ledger that there is; {_URLS}")
    return kind(parsed)


def _upgrade(connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", f"{__package__}:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def schema_version(connection: Connection, name: str) -> str | None:
    """The revision of the schema; None for an empty database, LedgerUnavailable for another's."""
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if "alembic_version" in tables and "audit_head" in tables:
        return connection.execute(_VERSION).scalar_one()
    raise LedgerUnavailable(
        f"{name} is the database of something else; give the ledger a database of its own"
    )


def _check_migratable(connection: Connection, name: str) -> str | None:
    version = schema_version(connection, name)
    if version is not None and version not in REVISIONS:
        _check_version(version, name)
    return version


def _check_version(version: str | None, name: str) -> None:
    if version is None:
        raise missing(name)
    if version not in REVISIONS:
        raise LedgerUnavailable(
            f"the ledger {name} has schema {version}, which a newer Shipworthy made (this one knows"
            f" {REVISIONS[-1]}); upgrade Shipworthy"
        )
    if version != REVISIONS[-1]:
        raise LedgerUnavailable(
            f"the ledger {name} has schema {version} and this version needs {REVISIONS[-1]};"
            " `shipworthy up` brings it up to date"
        )


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
