"""Forgetting a unit: everything that was recorded of it until now goes.

Only the unit's pseudonym gets as far as the ledger, and the audit log doesn't learn even that: the
act stays on record for ever, and must not say whom it was about.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from shipworthy.app.querying import Question, ask_lake
from shipworthy.app.session import Session
from shipworthy.domain.erasure import Tombstone
from shipworthy.domain.lifecycle import Principal
from shipworthy.errors import NotFound, UsageError
from shipworthy.gateway.tickets import Pseudonyms
from shipworthy.settings import Project
from shipworthy.stores.lake.state import load_place

_PSEUDONYM = re.compile(r"[0-9a-f]{16}")
_MEMORY = 512 * 1024**2
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Held:
    """How much the lake holds of a unit."""

    inferences: int
    feedback: int
    mirrors: int


def pseudonym_of(project: Project, unit: str) -> str:
    """What the unit is called in the lake; NotFound when the project's secret is gone."""
    if not unit:
        message = "the unit has no name; give it as clients send it in X-Shipworthy-Unit"
        raise UsageError(message)
    file = project.secrets / "pseudonyms"
    try:
        secret = file.read_bytes()
    except OSError as error:
        message = (
            f"can't read {file} ({error.strerror}), without which nobody knows what the unit is"
            " called in the lake; restore it from a backup"
        )
        raise NotFound(message) from error
    return Pseudonyms(secret).of(_as_received(unit))


def _as_received(unit: str) -> str:
    """The unit as the gateway reads it, which takes bytes that are no UTF-8 for Latin-1."""
    raw = os.fsencode(unit)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def check_pseudonym(text: str) -> str:
    """The text, which looks like a pseudonym; UsageError when it doesn't."""
    if _PSEUDONYM.fullmatch(text) is None:
        message = f"{text!r} is no pseudonym, which is 16 of 0-9 and a-f; leave --pseudonym out"
        raise UsageError(message)
    return text


def held_of(project: Project, pseudonym: str, seconds: float) -> Held:
    """Count what the lake holds of a unit now."""
    counts = ", ".join(
        f"(SELECT count(*) FROM {table} WHERE unit = '{check_pseudonym(pseudonym)}') AS {table}"  # noqa: S608  # 16 of 0-9 and a-f
        for table in ("inferences", "feedback", "mirrors")
    )
    question = Question(
        lake=str(project.lake),
        sql=f"SELECT {counts}",
        format="json",
        memory=_MEMORY,
        seconds=seconds,
    )
    pieces: list[bytes] = []
    ask_lake(question, pieces.append)
    return msgspec.json.decode(b"".join(pieces), type=list[Held])[0]


def forget_unit(session: Session, pseudonym: str, *, actor: Principal) -> int:
    """Have the unit forgotten; the tombstone's sequence.

    Once more is no harm: it also covers what came since.
    """
    now = session.clock()
    with session.ledger.write() as tx:
        sequence = tx.tombstones.add(Tombstone(unit=pseudonym, at=now, by=actor.id))
        tx.audit.append(at=now, actor=actor.id, act="forget unit", subject=f"tombstone {sequence}")
    return sequence


def is_erased(project: Project, sequence: int) -> bool:
    """Whether the lake's writer has deleted the unit of that tombstone from the lake."""
    place = load_place(project.lake_writer)
    return place is not None and place.forgotten >= sequence


def wait_until_erased(
    project: Project, sequence: int, seconds: float, pause: Callable[[float], None] = time.sleep
) -> bool:
    """Wait that long for the lake's writer; whether it has deleted the unit by then."""
    deadline = time.monotonic() + seconds
    erased = partial(is_erased, project, sequence)
    while not erased():
        if time.monotonic() >= deadline:
            return False
        pause(_LOOK_SECONDS)
    return True
