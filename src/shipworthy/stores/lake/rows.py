"""Records as the columns of the lake's tables."""

# arro3 types its arguments with bare generics.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from arro3.core import Array, DataType, Field, RecordBatch, Schema

from shipworthy.domain.erasure import asked_at
from shipworthy.domain.lifecycle import Decision
from shipworthy.domain.records import FeedbackRecord, InferenceRecord, MirrorRecord, Record
from shipworthy.stores.lake.minutes import count_minutes
from shipworthy.stores.lake.schema import (
    DECISIONS,
    FEEDBACK,
    INFERENCES,
    MINUTES,
    MIRRORS,
    Column,
    Table,
    Type,
)

Columns = Mapping[str, Sequence[Any]]

_DAY = 86_400
_END_OF_TIME = 253_402_300_800  # the year 10000, which no partition can be named after

_PLAIN: dict[Type, DataType] = {
    "string": DataType.utf8(),
    "binary": DataType.binary(),
    "double": DataType.float64(),
    "long": DataType.int64(),
    "boolean": DataType.bool(),
}
_json = msgspec.json.Encoder()


class Unfit(Exception):  # a state of affairs: caught where records are left out
    """Something in these records has no place in a column."""


def rows_of(records: Iterable[Record]) -> dict[Table, RecordBatch]:
    """The rows of each table that these records have any for. Raises Unfit."""
    inferences: list[InferenceRecord] = []
    feedback: list[FeedbackRecord] = []
    mirrors: list[MirrorRecord] = []
    for record in records:
        match record:
            case InferenceRecord():
                inferences.append(record)
            case FeedbackRecord():
                feedback.append(record)
            case MirrorRecord():
                mirrors.append(record)
    rows: dict[Table, RecordBatch] = {}
    try:
        if inferences:
            rows[INFERENCES] = _batch(INFERENCES, _inferences(inferences))
            rows[MINUTES] = _batch(MINUTES, count_minutes(inferences))
        if feedback:
            rows[FEEDBACK] = _batch(FEEDBACK, _feedback(feedback))
        if mirrors:
            rows[MIRRORS] = _batch(MIRRORS, _mirrors(mirrors))
    except Exception as error:  # whatever the columns make of a value that no gateway writes
        raise Unfit(str(error)) from error
    return rows


def split_unfit(records: Iterable[Record]) -> tuple[list[Record], int]:
    """The records that have a place in the tables, and how many have none."""
    fit: list[Record] = []
    unfit = 0
    for record in records:
        try:
            rows_of([record])
        except Unfit:
            unfit += 1
        else:
            fit.append(record)
    return fit, unfit


def decision_rows(decisions: Sequence[tuple[int, Decision]]) -> RecordBatch:
    """Decisions, each with its sequence in the ledger."""
    return _batch(
        DECISIONS,
        {
            "sequence": [sequence for sequence, _ in decisions],
            "time": [each.at for _, each in decisions],
            "id": [each.id for _, each in decisions],
            "model": [each.model for _, each in decisions],
            "kind": [each.kind for _, each in decisions],
            "text": [each.text for _, each in decisions],
            "rollout": [each.rollout for _, each in decisions],
            "numbers": [_json.encode(each.numbers).decode() for _, each in decisions],
        },
    )


def _inferences(records: Sequence[InferenceRecord]) -> Columns:
    times = [record.at for record in records]
    return {
        "day": _days(times),
        "time": times,
        "id": [record.id for record in records],
        "plan": [record.plan for record in records],
        "model": [record.model for record in records],
        "revision": [record.revision for record in records],
        "rollout": [record.rollout for record in records],
        "assigned": [record.assigned for record in records],
        "probability": [record.probability for record in records],
        "release": [record.release for record in records],
        "outcome": [record.outcome for record in records],
        "reason": [record.reason for record in records],
        "status": [record.status for record in records],
        "serving": [record.serving for record in records],
        "serving_release": [record.serving_release for record in records],
        "seconds": [record.seconds for record in records],
        "attempt_seconds": [record.attempt_seconds for record in records],
        "attempts": [record.attempts for record in records],
        "sent": [record.sent for record in records],
        "key": [record.key for record in records],
        "unit": [record.unit for record in records],
        "slices": [
            _json.encode(record.slices).decode() if record.slices else None for record in records
        ],
        "traceparent": [record.traceparent for record in records],
        "request_bytes": [record.request_bytes for record in records],
        "response_bytes": [record.response_bytes for record in records],
        "request": [record.request for record in records],
        "response": [record.response for record in records],
        "protocol": [record.protocol for record in records],
        "operation": [record.operation for record in records],
        "stream": [record.stream for record in records],
        "input_tokens": [record.input_tokens for record in records],
        "output_tokens": [record.output_tokens for record in records],
        "cached_tokens": [record.cached_tokens for record in records],
        "tokens_estimated": [record.tokens_estimated for record in records],
        "cost": [record.cost for record in records],
        "first_content_seconds": [record.first_content_seconds for record in records],
        "gap_seconds": [record.gap_seconds for record in records],
        "longest_gap_seconds": [record.longest_gap_seconds for record in records],
        "finish": [record.finish for record in records],
        "features": [
            _json.encode(record.features).decode() if record.features else None
            for record in records
        ],
        "request_digest": [record.request_digest for record in records],
        "response_digest": [record.response_digest for record in records],
        "redacted": [record.redacted for record in records],
    }


def _mirrors(records: Sequence[MirrorRecord]) -> Columns:
    times = [record.at for record in records]
    return {
        "day": _days(times),
        "time": times,
        "id": [record.id for record in records],
        "inference": [record.inference for record in records],
        "asked": [asked_at(record) for record in records],
        "plan": [record.plan for record in records],
        "model": [record.model for record in records],
        "release": [record.release for record in records],
        "compared_with": [record.compared_with for record in records],
        "outcome": [record.outcome for record in records],
        "reason": [record.reason for record in records],
        "status": [record.status for record in records],
        "seconds": [record.seconds for record in records],
        "agrees": [record.agrees for record in records],
        "difference": [record.difference for record in records],
        "input_tokens": [record.input_tokens for record in records],
        "output_tokens": [record.output_tokens for record in records],
        "cost": [record.cost for record in records],
        "response_bytes": [record.response_bytes for record in records],
        "response": [record.response for record in records],
        "response_digest": [record.response_digest for record in records],
        "unit": [record.unit for record in records],
        "redacted": [record.redacted for record in records],
    }


def _feedback(records: Sequence[FeedbackRecord]) -> Columns:
    times = [record.at for record in records]
    return {
        "day": _days(times),
        "time": times,
        "id": [record.id for record in records],
        "inference": [record.inference for record in records],
        "asked": [asked_at(record) for record in records],
        "kind": [record.kind for record in records],
        "name": [record.name for record in records],
        "value": [_json.encode(record.value).decode() for record in records],
        "number": [
            float(record.value) if isinstance(record.value, (int, float)) else None
            for record in records
        ],
        "unit": [record.unit for record in records],
        "assigned": [record.assigned for record in records],
        "trusted": [record.trusted for record in records],
        "key": [record.key for record in records],
    }


def _days(times: Sequence[float]) -> list[float]:
    if not all(0 <= time < _END_OF_TIME for time in times):
        raise Unfit("a time that is on no calendar")
    return [time // _DAY for time in times]


def _batch(table: Table, columns: Columns) -> RecordBatch:
    arrays = [_ARRAYS.get(each.type, _plain)(each, columns[each.name]) for each in table.columns]
    fields = [
        Field(column.name, array.type, nullable=True)
        for column, array in zip(table.columns, arrays, strict=True)
    ]
    return RecordBatch.from_arrays(arrays, schema=Schema(fields))


def _plain(column: Column, values: Sequence[Any]) -> Array:
    return Array(values, _PLAIN[column.type])


def _timestamps(_: Column, values: Sequence[float | None]) -> Array:
    micros = [None if value is None else int(value * 1e6) for value in values]
    return Array(micros, DataType.int64()).cast(DataType.timestamp("us", tz="UTC"))


def _dates(_: Column, values: Sequence[float]) -> Array:
    return Array([int(value) for value in values], DataType.int32()).cast(DataType.date32())


_ARRAYS: dict[Type, Callable[[Column, Sequence[Any]], Array]] = {
    "timestamp": _timestamps,
    "date": _dates,
}
