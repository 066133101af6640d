"""What the ledger needs of a database, and what each kind of database does in its own way."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Connection, Engine, Table

from shipworthy.errors import LedgerUnavailable


class Database(Protocol):
    """Where a ledger is kept. Its engines raise our errors, each with its cure."""

    @property
    def name(self) -> str:
        """How messages call it; never with a password."""
        ...

    def may_exist(self) -> bool:
        """Whether it is worth while to connect, which may make a file."""
        ...

    def create(self) -> None:
        """Make what tables need around them, unless it is there."""
        ...

    def prepare(self, timeout: float) -> None:
        """Set for good what can't be set within a transaction."""
        ...

    def open_reader(self, timeout: float) -> Engine:
        """Give an engine that can only read; each transaction is one consistent snapshot.

        The snapshot is that of its first query, so `hold_schema` comes before any.
        """
        ...

    def open_writer(self, timeout: float) -> Engine:
        """Give an engine of one connection that holds the writer's lock throughout a transaction.

        Args:
            timeout: Seconds to wait for another writer.

        """
        ...

    def open_migrator(self, timeout: float) -> Engine:
        """Give a writer that may rebuild tables while others refer to them."""
        ...

    def hold_schema(self, connection: Connection) -> None:
        """Keep migrations away from what this reader sees until its transaction ends."""
        ...

    def take_schema(self, connection: Connection) -> None:
        """Wait for readers that hold the schema, and keep others away until the commit."""
        ...

    def unguarded(self, connection: Connection, table: str) -> AbstractContextManager[None]:
        """A block in which the table's triggers sleep; for rows that others have checked."""
        ...

    def continue_sequence(self, connection: Connection, table: Table) -> None:
        """Let the next row be numbered behind all that were inserted with their numbers."""
        ...


def missing(name: str) -> LedgerUnavailable:
    """Give the error for a ledger that is not there."""
    return LedgerUnavailable(
        f"there is no ledger at {name}; put it back, or let `shipworthy up` make one"
    )
