"""The ledger on SQL: one schema, one small repository per need, one transaction over all of them.

`migrate(url)` creates a ledger or brings its schema up to date; `open_ledger(url)` never does.
`copy_ledger(source, target)` moves one to another place or kind of database.
"""

from __future__ import annotations

from shipworthy.stores.ledger.copying import copy_ledger
from shipworthy.stores.ledger.ledger import (
    SqlLedger,
    SqlTransaction,
    database_at,
    is_ledger,
    migrate,
    open_ledger,
)

__all__ = [
    "SqlLedger",
    "SqlTransaction",
    "copy_ledger",
    "database_at",
    "is_ledger",
    "migrate",
    "open_ledger",
]
