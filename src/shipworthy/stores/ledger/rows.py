"""Values to rows and back. A column is named like the field that it keeps, so one way fits all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Select, Table, insert, update
from sqlalchemy.sql.elements import ColumnElement

from shipworthy.errors import LedgerUnavailable

Value = TypeVar("Value", bound=msgspec.Struct)


def to_row(value: msgspec.Struct) -> dict[str, Any]:
    """Give the value's fields as plain column values."""
    return msgspec.to_builtins(value)


def from_row(row: Mapping[Any, Any], kind: type[Value]) -> Value:
    """Give the value that a row keeps; columns that are no fields (`sequence`) are ignored.

    Raises:
        LedgerUnavailable: Another version of Shipworthy wrote something that this one can't read.

    """
    try:
        return msgspec.convert({field: row[field] for field in kind.__struct_fields__}, kind)
    except msgspec.ValidationError as error:
        raise unreadable(kind.__name__, error) from error


def all_of(connection: Connection, query: Select[Any], kind: type[Value]) -> list[Value]:
    """Give the values of all rows that a query finds."""
    return [from_row(row, kind) for row in connection.execute(query).mappings()]


def first_of(connection: Connection, query: Select[Any], kind: type[Value]) -> Value | None:
    """Give the value of the first row that a query finds."""
    row = connection.execute(query).mappings().first()
    return None if row is None else from_row(row, kind)


def unreadable(what: str, error: Exception) -> LedgerUnavailable:
    """Give the error for stored content that this version of the code does not understand."""
    return LedgerUnavailable(
        f"the ledger holds a {what} that this version can't read ({error});"
        " use the version of Shipworthy that wrote it, or a newer one"
    )


def replace(
    connection: Connection, table: Table, where: ColumnElement[bool], row: dict[str, Any]
) -> None:
    """Update the one row that `where` names, or insert it.

    Not an upsert, which each database spells its own way: the writer's lock is held anyway, so
    nobody can come in between.
    """
    if not connection.execute(update(table).where(where).values(row)).rowcount:
        connection.execute(insert(table).values(row))
