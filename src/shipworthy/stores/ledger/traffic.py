"""How much each release answered, minute by minute."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, delete, insert, select, update

from shipworthy.domain.lifecycle import TrafficCount
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.rows import all_of, to_row

_counts = schema.traffic_counts.c


class SqlTraffic:
    """Traffic counts; they are only ever added to, and forgotten when old."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, counts: Iterable[TrafficCount]) -> None:
        """Add to what is counted already for the same plan, release and minute."""
        for count in counts:
            grown = (
                update(schema.traffic_counts)
                .where(
                    _counts.plan == count.plan,
                    _counts.minute == count.minute,
                    _counts.release == count.release,
                )
                .values(
                    assigned=_counts.assigned + count.assigned,
                    failed=_counts.failed + count.failed,
                    served=_counts.served + count.served,
                )
            )
            if not self._connection.execute(grown).rowcount:
                self._connection.execute(insert(schema.traffic_counts).values(to_row(count)))

    def since(self, plan: str, minute: int) -> list[TrafficCount]:
        """Counts of that minute and later ones, oldest first."""
        query = (
            select(schema.traffic_counts)
            .where(_counts.plan == plan, _counts.minute >= minute)
            .order_by(_counts.minute, _counts.release)
        )
        return all_of(self._connection, query, TrafficCount)

    def forget_before(self, minute: int) -> None:
        """Drop counts of earlier minutes."""
        self._connection.execute(delete(schema.traffic_counts).where(_counts.minute < minute))
