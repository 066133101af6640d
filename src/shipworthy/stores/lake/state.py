"""What the lake's writer remembers: its place, which it must not lose, and its condition."""

from __future__ import annotations

import msgspec


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which batch of journal records is under way, written to disk before any of it is.

    The batch holds the records between the cursors `start` and `end`; both are byte offsets by
    segment name. It is written by the writer named `slot` as its transaction `batch`; whether a
    table has it is the table's to say. `forgotten` is the newest tombstone whose unit was deleted.
    """

    slot: str
    batch: int = 0
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    forgotten: int = 0


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """How the writer is, for people: lost, it is made anew.

    Every record from before `complete` is in the lake: how far that is behind the clock is the lag.
    `committed` is when records were last written; `records` how many were since the process began
    and `skipped` what it could not read, by reason; `problem` the fault that it waits for.
    """

    at: float
    complete: float
    committed: float | None = None
    records: int = 0
    skipped: dict[str, int] = {}
    problem: str = ""
