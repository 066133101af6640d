"""The append-only, hash-chained log of acts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, insert, select, update

from shipworthy.domain.audit import AuditEntry, AuditHead, seal
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.rows import from_row, to_row

_entries = schema.audit_entries.c
_head = schema.audit_head.c


class SqlAudit:
    """The append-only log of acts. The database itself refuses to change or delete an entry."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def append(
        self, *, at: float, actor: str, act: str, subject: str, detail: dict[str, Any] | None = None
    ) -> AuditEntry:
        """Add an act behind the head.

        Raises:
            ValueError: `detail` is no JSON: it holds NaN, an infinity or a type that JSON lacks.

        """
        # Locked, so that where writers are not queued up from the start the chain can't fork.
        locked = select(_head.sequence, _head.hash).with_for_update()
        sequence, previous = self._connection.execute(locked).one()
        entry = seal(
            AuditEntry(
                sequence=sequence + 1,
                at=float(at),  # as it will be read back: the hash covers the spelling
                actor=actor,
                act=act,
                subject=subject,
                detail=detail or {},
                previous=previous,
            )
        )
        self._connection.execute(insert(schema.audit_entries).values(to_row(entry)))
        head = {"sequence": entry.sequence, "hash": entry.hash}
        self._connection.execute(update(schema.audit_head).values(head))
        return entry

    def entries(self) -> Iterator[AuditEntry]:
        """Oldest first, in flat memory; to be read before the transaction ends."""
        query = select(schema.audit_entries).order_by(_entries.sequence)
        rows = self._connection.execute(query.execution_options(yield_per=500)).mappings()
        return (from_row(row, AuditEntry) for row in rows)

    def head(self) -> AuditHead:
        """The chain's end; sequence 0 and the genesis hash before the first entry."""
        head = self._connection.execute(select(schema.audit_head)).mappings().one()
        return from_row(head, AuditHead)
