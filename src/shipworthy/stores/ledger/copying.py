"""A ledger's rows, from one database into another, of the same kind or not."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, func, insert, select, update

from shipworthy.domain import audit
from shipworthy.domain.terms import Term
from shipworthy.errors import Conflict, IntegrityError
from shipworthy.ports import Progress
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.audit import SqlAudit
from shipworthy.stores.ledger.database import Database
from shipworthy.stores.ledger.delivery import SqlTerms
from shipworthy.stores.ledger.ledger import TIMEOUT, database_at, migrate, open_ledger

_BATCH = 500

_SINGLE = (schema.keeper_term, schema.audit_head)
"""Tables that have their one row from the beginning."""


def copy_ledger(
    source: str, target: str, progress: Progress | None = None, *, timeout: float = TIMEOUT
) -> audit.AuditHead:
    """Copy all rows of one ledger, as they are at one moment, into another one that is empty.

    The source can be written meanwhile. The target is made when it is missing; it has all rows or,
    whatever happens, none.

    Args:
        source: URL of a ledger of this version.
        target: URL of a ledger without rows, or of a place for one.
        progress: Called with the number of rows copied since the last call.
        timeout: Seconds to wait for another writer of the target.

    Returns:
        The end of the audit chain, which was verified in the target.

    Raises:
        Conflict: The target holds rows.
        IntegrityError: The audit chain of the source does not hold.
        LedgerUnavailable: Either can't be reached, or is of another version.

    """
    with open_ledger(source, timeout=timeout) as old, old.reading() as rows:
        migrate(target, timeout=timeout)
        with open_ledger(target, timeout=timeout) as new, new.writing() as connection:
            database = database_at(target)
            _check_empty(connection, database)
            for table in schema.metadata.sorted_tables:
                _copy(rows, connection, table, database, progress)
            return _verified(connection, database)


def _check_empty(connection: Connection, database: Database) -> None:
    counted = [table for table in schema.metadata.sorted_tables if table not in _SINGLE]
    filled = [
        table.name
        for table in counted
        if connection.execute(select(func.count()).select_from(table)).scalar_one()
    ]
    if SqlTerms(connection).current() != Term():
        filled.append(schema.keeper_term.name)
    if filled:
        raise Conflict(
            f"the ledger {database.name} holds rows already ({', '.join(filled)});"
            " give the place of an empty one"
        )


def _copy(
    source: Connection,
    target: Connection,
    table: Table,
    database: Database,
    progress: Progress | None,
) -> None:
    query = select(table).order_by(*table.primary_key)
    found = source.execute(query.execution_options(yield_per=_BATCH)).mappings()
    for batch in found.partitions(_BATCH):
        rows: list[dict[str, Any]] = [dict(row) for row in batch]
        if table in _SINGLE:
            with database.unguarded(target, table.name):
                target.execute(update(table).values(rows[0]))
        else:
            target.execute(insert(table), rows)
        if progress is not None:
            progress(len(rows))
    if "sequence" in table.c and table.c.sequence is table.autoincrement_column:
        database.continue_sequence(target, table)


def _verified(connection: Connection, database: Database) -> audit.AuditHead:
    log = SqlAudit(connection)
    head = log.head()
    problems = audit.verify(log.entries(), head=head)
    if problems:
        raise IntegrityError(
            f"the audit log that {database.name} would hold is broken ({problems[0]}); restore the"
            " ledger that it came from"
        )
    return head
