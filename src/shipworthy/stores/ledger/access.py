"""Who acts, and with which keys."""

from __future__ import annotations

import builtins
import secrets

import msgspec
from sqlalchemy import Connection, insert, select, update

from shipworthy.domain.lifecycle import Principal
from shipworthy.domain.plan import Key, Limits
from shipworthy.ports import StoredKey
from shipworthy.stores.ledger import schema
from shipworthy.stores.ledger.rows import first_of, from_row, to_row

_principals = schema.principals.c
_keys = schema.keys.c


class SqlPrincipals:
    """Who acts."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ensure(self, name: str, kind: str = "person") -> Principal:
        """The principal of that name, made with a random id when new."""
        query = select(schema.principals).where(_principals.name == name)
        known = first_of(self._connection, query, Principal)
        if known is not None:
            return known
        fields = {"id": secrets.token_hex(8), "name": name, "kind": kind}
        principal = msgspec.convert(fields, Principal)
        self._connection.execute(insert(schema.principals).values(to_row(principal)))
        return principal

    def get(self, id: str) -> Principal | None:
        """The principal of that id."""
        query = select(schema.principals).where(_principals.id == id)
        return first_of(self._connection, query, Principal)


class SqlKeys:
    """Gateway keys."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, key: StoredKey) -> None:
        """Keep a new key; Conflict when its id or hash is known."""
        fields = to_row(key)
        self._connection.execute(insert(schema.keys).values(fields.pop("key") | fields))

    def revoke(self, id: str, at: float) -> bool:
        """Whether there was such a key, not yet revoked."""
        statement = update(schema.keys).where(_keys.id == id, _keys.revoked_at.is_(None))
        return bool(self._connection.execute(statement.values(revoked_at=at)).rowcount)

    def limit(self, id: str, limits: Limits) -> bool:
        """Give a key other limits; whether there is such a key, not revoked."""
        statement = update(schema.keys).where(_keys.id == id, _keys.revoked_at.is_(None))
        values = {"limits": msgspec.to_builtins(limits)}
        return bool(self._connection.execute(statement.values(values)).rowcount)

    def list(self) -> builtins.list[StoredKey]:
        """All of them, oldest first, the revoked ones too."""
        query = select(schema.keys).order_by(_keys.sequence)
        return [
            StoredKey(
                # Keys of revision 0002 and before have no limits in their row.
                key=from_row({**row, "limits": row["limits"] or {}}, Key),
                principal=row["principal"],
                created_at=row["created_at"],
                revoked_at=row["revoked_at"],
            )
            for row in self._connection.execute(query).mappings()
        ]
