"""The lake's tables, as any reader of Delta sees them.

A column is never renamed or given another type; new ones are added at the end, and rows from before
have no value there. `personal` columns say something about a unit or what it sent: they keep no
statistics, neither in the table's log nor in its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Type = Literal["string", "binary", "double", "long", "boolean", "timestamp", "date"]
"""`timestamp` is in UTC, to the microsecond."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column; all may be empty."""

    name: str
    type: Type
    personal: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """One table; with a `day` it is partitioned by it."""

    name: str
    columns: tuple[Column, ...]

    @property
    def by_day(self) -> bool:
        """Whether it is partitioned by the UTC day of its rows."""
        return self.columns[0] == DAY

    @property
    def plain(self) -> tuple[str, ...]:
        """The columns that may keep statistics."""
        return tuple(column.name for column in self.columns if not column.personal)


DAY = Column("day", "date")

INFERENCES = Table(
    "inferences",
    (
        DAY,
        Column("time", "timestamp"),
        Column("id", "string", personal=True),  # it has the unit's pseudonym inside
        Column("plan", "string"),
        Column("model", "string"),
        Column("revision", "long"),
        Column("rollout", "string"),
        Column("assigned", "string"),
        Column("probability", "double"),
        Column("release", "string"),
        Column("outcome", "string"),
        Column("reason", "string"),
        Column("status", "long"),
        Column("serving", "string"),
        Column("serving_release", "string"),
        Column("seconds", "double"),
        Column("attempt_seconds", "double"),
        Column("attempts", "long"),
        Column("sent", "timestamp"),
        Column("key", "string"),
        Column("unit", "string", personal=True),
        Column("slices", "string", personal=True),  # a JSON object of strings
        Column("traceparent", "string", personal=True),
        Column("request_bytes", "long"),
        Column("response_bytes", "long"),
        Column("request", "binary", personal=True),
        Column("response", "binary", personal=True),
        Column("protocol", "string"),
        Column("operation", "string"),
        Column("stream", "boolean"),
        Column("input_tokens", "long"),
        Column("output_tokens", "long"),
        Column("cached_tokens", "long"),
        Column("tokens_estimated", "boolean"),
        Column("cost", "double"),
        Column("first_content_seconds", "double"),
        Column("gap_seconds", "double"),
        Column("longest_gap_seconds", "double"),
        Column("finish", "string"),
        Column("features", "string", personal=True),  # a JSON object of numbers and strings
        Column("request_digest", "string", personal=True),  # whoever guesses a body can prove it
        Column("response_digest", "string", personal=True),
        Column("redacted", "long"),
    ),
)

FEEDBACK = Table(
    "feedback",
    (
        DAY,
        Column("time", "timestamp"),
        Column("id", "string"),
        Column("inference", "string", personal=True),
        Column("asked", "timestamp"),  # when the inference was
        Column("kind", "string"),
        Column("name", "string"),
        Column("value", "string", personal=True),  # JSON
        Column("number", "double", personal=True),  # the value, where it is a number or boolean
        Column("unit", "string", personal=True),
        Column("assigned", "string"),
        Column("trusted", "boolean"),
        Column("key", "string"),
    ),
)

MIRRORS = Table(
    "mirrors",
    (
        DAY,
        Column("time", "timestamp"),
        Column("id", "string", personal=True),
        Column("inference", "string", personal=True),
        Column("asked", "timestamp"),  # when the inference was
        Column("plan", "string"),
        Column("model", "string"),
        Column("release", "string"),
        Column("compared_with", "string"),
        Column("outcome", "string"),
        Column("reason", "string"),
        Column("status", "long"),
        Column("seconds", "double"),
        Column("agrees", "boolean"),
        Column("difference", "string", personal=True),  # it may name a field as the client did
        Column("input_tokens", "long"),
        Column("output_tokens", "long"),
        Column("cost", "double"),
        Column("response_bytes", "long"),
        Column("response", "binary", personal=True),
        Column("response_digest", "string", personal=True),
        Column("unit", "string", personal=True),
        Column("redacted", "long"),
    ),
)

DECISIONS = Table(
    "decisions",
    (
        Column("sequence", "long"),
        Column("time", "timestamp"),
        Column("id", "string"),
        Column("model", "string"),
        Column("kind", "string"),
        Column("text", "string"),
        Column("rollout", "string"),
        Column("numbers", "string"),  # JSON
    ),
)

MINUTES = Table(
    "minutes",
    (
        # Counts of inferences, so that a dashboard needn't read them all. Several rows may say
        # something about the same things: they are to be added up.
        DAY,
        Column("minute", "timestamp"),
        Column("plan", "string"),
        Column("model", "string"),
        Column("release", "string"),  # the assigned one
        Column("rollout", "string"),
        Column("assigned", "string"),
        Column("serving_release", "string"),
        Column("outcome", "string"),
        Column("reason", "string"),
        Column("slice", "string"),  # "" counts every inference, "country=DE" those of that slice
        Column("bucket", "long"),  # floor(20 ln seconds): steps of 5%; of slices there is none
        Column("requests", "long"),
        Column("seconds", "double"),  # the sum
        Column("request_bytes", "long"),
        Column("response_bytes", "long"),
        Column("input_tokens", "long"),
        Column("output_tokens", "long"),
        Column("cost", "double"),
    ),
)

TABLES = (INFERENCES, FEEDBACK, MIRRORS, DECISIONS, MINUTES)
BUCKETS_PER_E = 20
"""Latency buckets for each factor of e."""
SHORTEST = 1e-6
"""Seconds; what is shorter counts as this in buckets."""
