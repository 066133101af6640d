"""The ledger's tables. Migrations create them; a test sees that both say the same.

Columns bear the names of the fields that they keep. Times are Unix seconds. Where people see an
order ("newest first") it is the order of insertion, `sequence`: clocks step back, sequences don't.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from shipworthy.domain.canonical import canonical_json

REVISIONS = ("0001", "0002", "0003")
"""Every schema version, oldest first. Code works with the last one alone."""


class Json(TypeDecorator[Any]):
    """Plain values kept as canonical JSON text: equal values are equal bytes, in any database."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Encode; ValueError for what is no JSON, such as NaN."""
        return None if value is None else canonical_json(value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """Decode."""
        return None if value is None else json.loads(value)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Seconds: Double[float] = Double()
# SQLite counts by itself only in a column of type INTEGER.
_Counter = BigInteger().with_variant(Integer(), "sqlite")


def _sequence() -> Column[int]:
    return Column("sequence", _Counter, primary_key=True)


releases = Table(
    "releases",
    metadata,
    Column("model", String(63), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(71), nullable=False),
    Column("manifest", Json, nullable=False),
    Column("created_at", _Seconds, nullable=False),
    Column("created_by", String, nullable=False),
    UniqueConstraint("model", "digest"),
)

stage_entries = Table(
    "stage_entries",
    metadata,
    _sequence(),
    Column("model", String(63), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("release", String(71), nullable=False),
    Column("policy", String(71)),
    Column("at", _Seconds, nullable=False),
    Column("rollback", Boolean, nullable=False),
    ForeignKeyConstraint(["model", "release"], ["releases.model", "releases.digest"]),
    Index(None, "model", "stage", "sequence"),
)

policies = Table(
    "policies",
    metadata,
    Column("model", String(63), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(71), nullable=False),
    Column("document", Json, nullable=False),
    Column("applied_at", _Seconds, nullable=False),
    Column("applied_by", String, nullable=False),
    Index(None, "model", "digest"),
)

principals = Table(
    "principals",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
)

keys = Table(
    "keys",
    metadata,
    _sequence(),
    Column("id", String, nullable=False, unique=True),
    Column("hash", String, nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("models", Json, nullable=False),
    Column("expires", _Seconds),
    Column("principal", String, nullable=False),
    Column("created_at", _Seconds, nullable=False),
    Column("revoked_at", _Seconds),
    Column("limits", Json),
)

findings = Table(
    "findings",
    metadata,
    _sequence(),
    Column("release", String(71), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("check", String, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("observed", Text, nullable=False),
    Column("threshold", Text, nullable=False),
    Column("at", _Seconds, nullable=False),
    Column("expires", _Seconds),
    Column("evidence", Json, nullable=False),
    Index(None, "release", "stage", "check", "sequence"),
)

approvals = Table(
    "approvals",
    metadata,
    _sequence(),
    Column("release", String(71), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("by", String, nullable=False),
    Column("at", _Seconds, nullable=False),
    Column("reason", Text, nullable=False),
    Index(None, "release", "stage"),
)

waivers = Table(
    "waivers",
    metadata,
    _sequence(),
    Column("what", String, nullable=False),
    Column("by", String, nullable=False),
    Column("at", _Seconds, nullable=False),
    Column("reason", Text, nullable=False),
    Column("model", String(63)),
    Column("until", _Seconds),
)

deployments = Table(
    "deployments",
    metadata,
    _sequence(),
    Column("id", String, nullable=False, unique=True),
    Column("model", String(63), nullable=False),
    Column("release", String(71), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("wanted", Boolean, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("since", _Seconds, nullable=False),
    Column("endpoints", Json, nullable=False),
    Column("message", Text, nullable=False),
    Column("retire_at", _Seconds),
)

intents = Table(
    "intents",
    metadata,
    _sequence(),
    Column("id", String, nullable=False, unique=True),
    Column("at", _Seconds, nullable=False),
    Column("actor", String, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("model", String(63), nullable=False),
    Column("release", String),
    Column("stage", String(16)),
    Column("reason", Text, nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("answer", Text, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    _sequence(),
    Column("id", String, nullable=False, unique=True),
    Column("model", String(63), nullable=False),
    Column("status", String(16), nullable=False),
    Column("started", _Seconds, nullable=False),
    Column("ended", _Seconds, index=True),
    # MessagePack: test states hold floats that JSON has no word for.
    Column("state", LargeBinary, nullable=False),
    Index(None, "model", "sequence"),
)

rollout_units = Table(
    "rollout_units",
    metadata,
    Column("rollout", String, primary_key=True),
    Column("unit", String, primary_key=True),
    Column("history", LargeBinary, nullable=False),
    # Deferred: units and rollout may be saved in either order within a transaction.
    ForeignKeyConstraint(["rollout"], ["rollouts.id"], deferrable=True, initially="DEFERRED"),
    sqlite_with_rowid=False,
)

decisions = Table(
    "decisions",
    metadata,
    _sequence(),
    Column("id", String, nullable=False, unique=True),
    Column("at", _Seconds, nullable=False),
    Column("model", String(63), nullable=False),
    Column("kind", String, nullable=False),
    Column("text", Text, nullable=False),
    Column("rollout", String),
    Column("numbers", Json, nullable=False),
    Index(None, "model", "sequence"),
)

plans = Table(
    "plans",
    metadata,
    Column("name", String, primary_key=True),
    Column("plan", Json, nullable=False),
)

traffic_counts = Table(
    "traffic_counts",
    metadata,
    Column("plan", String, primary_key=True),
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("release", String, primary_key=True),
    Column("assigned", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("served", BigInteger, nullable=False),
)

journal_cursors = Table(
    "journal_cursors",
    metadata,
    Column("segment", String, primary_key=True),
    Column("offset", BigInteger, nullable=False),
)

keeper_term = Table(
    "keeper_term",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("holder", String, nullable=False),
    Column("until", _Seconds, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

tombstones = Table(
    "tombstones",
    metadata,
    _sequence(),
    Column("unit", String, nullable=False),
    Column("at", _Seconds, nullable=False),
    Column("by", String, nullable=False),
)

audit_entries = Table(
    "audit_entries",
    metadata,
    Column("sequence", _Counter, primary_key=True, autoincrement=False),
    Column("at", _Seconds, nullable=False),
    Column("actor", String, nullable=False),
    Column("act", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("detail", Json, nullable=False),
    Column("previous", String(71), nullable=False),
    Column("hash", String(71), nullable=False),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", String(71), nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)
