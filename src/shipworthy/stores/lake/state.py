"""What the lake's writer remembers: its place, which it must not lose, and its condition."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shipworthy.errors import IntegrityError, Unavailable
from shipworthy.stores.files import replace_file


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which batch of journal records is under way, written to disk before any of it is.

    The batch holds the records between the cursors `start` and `end`; both are byte offsets by
    segment name. It is written by the writer named `slot` as its transaction `batch`; whether a
    table has it is the table's to say. Once all have it, `start` is `end`.

    `forgotten` is the newest tombstone whose unit was deleted, and `purge` the Unix time from which
    the files that it was in may be removed; None when they are gone.
    """

    slot: str
    batch: int = 0
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    forgotten: int = 0
    purge: float | None = None

    @property
    def done(self) -> bool:
        """Whether every table has the batch."""
        return self.start == self.end


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


def load_condition(file: Path) -> Condition | None:
    """How the writer was last; None where that can't be told."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Condition)
    except (OSError, msgspec.MsgspecError):
        return None


def load_place(file: Path) -> Place | None:
    """The place; None where nothing was written yet. Raises IntegrityError when it is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Place)
    except FileNotFoundError:
        return None
    except OSError as error:
        message = f"can't read {file} ({error.strerror}); check its permissions"
        raise Unavailable(message) from error
    except msgspec.MsgspecError as error:
        message = f"{file} is damaged ({error}); restore it and the lake from a backup"
        raise IntegrityError(message) from error


def save_place(file: Path, place: Place) -> None:
    """Have the place on the disk when this returns; Unavailable when that refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        message = f"can't make {file.parent} ({error.strerror}); check its permissions"
        raise Unavailable(message) from error
    replace_file(file, msgspec.json.encode(place), sync=True)
