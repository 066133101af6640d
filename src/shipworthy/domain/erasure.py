"""Forgetting a unit: what was recorded of it until then goes, and what arrives late with it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shipworthy.domain.records import InferenceRecord, MirrorRecord, Record


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """That a unit (its pseudonym) was to be forgotten at a Unix time, asked for by a principal.

    `sequence` is the ledger's order, from 1; 0 before it has one.
    """

    unit: str
    at: float
    by: str
    sequence: int = 0


def is_forgotten(record: Record, forgotten: Mapping[str, float]) -> bool:
    """Whether a record may not be kept; `forgotten` has the time of each unit's newest tombstone.

    A request counts by its own time, feedback and the answer of a mirrored release by the time of
    the inference that they are about: what a unit does after it was forgotten is a new beginning.
    """
    if record.unit is None:
        return False
    until = forgotten.get(record.unit)
    if until is None:
        return False
    about = asked_at(record)
    return about is None or about <= until


def asked_at(record: Record) -> float | None:
    """The Unix time of the inference that a record is about; None where nobody knows it.

    A mirrored release was called when the request came in.
    """
    if isinstance(record, InferenceRecord):
        return record.at
    if isinstance(record, MirrorRecord) and record.asked_at is None:
        return record.at - record.seconds
    return record.asked_at
