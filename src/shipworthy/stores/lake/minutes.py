"""Inferences counted by minute, so that a dashboard needn't read each of them."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, log
from typing import Any

from shipworthy.domain.records import InferenceRecord
from shipworthy.stores.lake.schema import BUCKETS_PER_E, MINUTES, SHORTEST


def count_minutes(records: Iterable[InferenceRecord]) -> dict[str, list[Any]]:
    """The rows of `minutes` for these inferences, as columns; times in seconds since 1970.

    Each inference counts once under the slice "", by bucket of its latency, and once under each of
    its own slices.
    """
    sums: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        what: tuple[Any, ...] = (
            record.at // 60,
            record.plan,
            record.model,
            record.release,
            record.rollout,
            record.assigned,
            record.serving_release,
            record.outcome._value_,  # the enum's own hash takes as long as all the rest
            record.reason,
        )
        bucket = floor(BUCKETS_PER_E * log(max(SHORTEST, record.seconds)))
        _add(sums, (what, "", bucket), record)
        for name, value in record.slices.items():
            _add(sums, (what, f"{name}={value}", None), record)
    return _columns(sums)


def _add(
    sums: dict[tuple[Any, ...], list[float]], key: tuple[Any, ...], record: InferenceRecord
) -> None:
    found = sums.get(key)
    if found is None:
        sums[key] = [
            1,
            record.seconds,
            record.request_bytes,
            record.response_bytes,
            record.input_tokens or 0,
            record.output_tokens or 0,
            record.cost or 0.0,
        ]
        return
    found[0] += 1
    found[1] += record.seconds
    found[2] += record.request_bytes
    found[3] += record.response_bytes
    found[4] += record.input_tokens or 0
    found[5] += record.output_tokens or 0
    found[6] += record.cost or 0.0


def _columns(sums: dict[tuple[Any, ...], list[float]]) -> dict[str, list[Any]]:
    names = [column.name for column in MINUTES.columns]
    rows = [
        (what[0] // 1440, what[0] * 60, *what[1:], part, bucket, *found)
        for (what, part, bucket), found in sums.items()
    ]
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
