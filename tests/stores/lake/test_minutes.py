"""Inferences counted by minute."""

from __future__ import annotations

import math
from collections.abc import Callable

from shipworthy.domain.records import InferenceRecord, Outcome
from shipworthy.stores.lake.minutes import count_minutes
from shipworthy.stores.lake.schema import BUCKETS_PER_E, MINUTES

Inference = Callable[..., InferenceRecord]
START = 1_790_000_040.0  # a whole minute


def rows(*records: InferenceRecord) -> list[dict]:
    columns = count_minutes(records)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_nothing_was_asked():
    assert count_minutes([]) == {}


def test_what_is_alike_is_added_up(inference: Inference):
    sizes = {"request_bytes": 10, "response_bytes": 3}
    (row,) = rows(
        inference(1, at=START, seconds=0.5, **sizes),
        inference(2, at=START + 59.9, seconds=0.51, **sizes),
    )
    assert list(row) == [column.name for column in MINUTES.columns]
    assert (row["day"], row["minute"]) == (START // 86_400, START)
    assert (row["requests"], row["seconds"]) == (2, 1.01)
    assert (row["request_bytes"], row["response_bytes"]) == (20, 6)
    assert (row["outcome"], row["slice"], row["rollout"]) == ("success", "", "")
    assert row["bucket"] == math.floor(BUCKETS_PER_E * math.log(0.5))


def test_what_differs_is_kept_apart(inference: Inference):
    base = {"at": START}
    differing = [
        {},
        {"at": START + 60},
        {"plan": "other"},
        {"model": "other"},
        {"release": "digits@2"},
        {"rollout": "r"},
        {"assigned": "candidate"},
        {"serving_release": "digits@1"},
        {"outcome": Outcome.FAILURE},
        {"reason": "timeout"},
        {"seconds": 0.02},
    ]
    found = rows(*(inference(n, **(base | fields)) for n, fields in enumerate(differing)))
    assert [row["requests"] for row in found] == [1] * len(differing)


def test_an_inference_counts_once_in_all_and_once_in_each_of_its_slices(inference: Inference):
    found = rows(
        inference(1, at=START, slices={"country": "DE", "plan": "pro"}),
        inference(2, at=START, slices={"country": "DE"}),
        inference(3, at=START),
    )
    counted = {row["slice"]: row["requests"] for row in found}
    assert counted == {"": 3, "country=DE": 2, "plan=pro": 1}
    assert {row["bucket"] is None for row in found if row["slice"]} == {True}


def test_no_time_at_all_has_a_bucket(inference: Inference):
    found = rows(inference(1, at=START, seconds=0.0), inference(2, at=START, seconds=-1.0))
    assert [row["bucket"] for row in found] == [math.floor(BUCKETS_PER_E * math.log(1e-6))]
